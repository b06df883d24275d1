"""A thin reference CLIP: towers, tokenizer, zero-shot classification, a matching head.

`CLIPConfig(scale=10, bias=-10)` has SigLIP's head: a bias of the logits, and its initial values.
Names are imported on first use: the tokenizer needs `tokenizers`, the model `safetensors`.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "CLIP": "model",
    "CLIPConfig": "config",
    "load_pretrained": "pretrained",
    "MatchingHead": "matching",
    "WithViews": "views",
    "freeze_as_bag_of_tokens": "bag_of_tokens",
    "matching_loss": "matching",
    "Tokenizer": "tokenizer",
    "class_features": "zero_shot",
    "classify": "zero_shot",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
