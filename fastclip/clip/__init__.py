"""A thin reference CLIP: towers, tokenizer, zero-shot classification.

The names are imported on first use, since they need packages of the demo (safetensors,
tokenizers).
"""

import importlib
from typing import Any

_HOMES = {
    "CLIP": "model",
    "CLIPConfig": "model",
    "Tokenizer": "tokenizer",
    "class_features": "zero_shot",
    "classify": "zero_shot",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
