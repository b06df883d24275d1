"""OpenAI's own state dicts: open_clip's names, three numbers, and quick_gelu everywhere."""

from typing import Any

from . import open_clip
from .keys import State

NAME = "an OpenAI CLIP with a ViT"
ENTRIES = {
    "input_resolution": "image_size",
    "context_length": "context_length",
    "vocab_size": "vocab_size",
}
HARMLESS = (*open_clip.HARMLESS, *ENTRIES)
CONFIG = open_clip.CONFIG
sources = open_clip.sources


def facts(state: State, config: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what shapes and OpenAI's code tell, and nothing from a configuration.

    Raises:
        ValueError: one of the three numbers contradicts the shapes.
    """
    found, told = open_clip.facts(state, config)
    for entry, field in ENTRIES.items():
        if entry in state and int(state[entry]) != found[field]:
            raise ValueError(
                f"{entry} must be the shapes' {field}, {found[field]}, got {int(state[entry])}"
            )
    return found | {
        "image_heads": found["image_width"] // 64, "text_heads": found["text_width"] // 64,
        "image_activation": "quick_gelu", "text_activation": "quick_gelu",
        "text_pool": "highest", "causal": True, "image_pool": "class",
    }, told  # fmt: skip
