"""Recognises whose weights a state dict holds."""

from types import ModuleType

from . import open_clip, openai, transformers
from .keys import State, listed

# Prefixes of every key that wrappers of the model add.
WRAPPERS = ("module.", "_orig_mod.")
UNSUPPORTED = {
    "visual.layer1.": "a ResNet image tower",
    "visual.trunk.stem": "an image tower of timm that is no ViT",
    "visual.trunk.stages": "an image tower of timm that is no ViT",
    "visual.trunk.head.": "an image tower of timm with its own head",
    "text.transformer.embeddings.": "a text tower of transformers",
    "text.transformer.encoder.": "a text tower of transformers",
    "text_decoder.": "CoCa's decoder",
}


def unwrapped(state: State) -> State:
    """Returns the state dict without what a wrapper put before every key."""
    for prefix in WRAPPERS:
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def recognise(state: State) -> ModuleType:
    """Returns the module of this package that reads the state dict.

    Raises:
        ValueError: no module does.
    """
    for start, what in UNSUPPORTED.items():
        if found := [key for key in state if key.startswith(start)]:
            raise ValueError(f"{what} is not supported, got {listed(found[:3])}")
    if any(key.startswith("vision_model.") for key in state):
        return transformers
    if any(entry in state for entry in openai.ENTRIES):
        return openai
    if any(key.startswith("visual.") for key in state):
        return open_clip
    raise ValueError(
        "the weights must be those of an image and a text tower by open_clip, OpenAI or "
        f"transformers, got {listed(list(state)[:5]) or 'an empty state dict'}"
    )
