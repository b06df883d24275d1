"""Loads other libraries' weights into `fastclip.clip.CLIP`.

    model = load_pretrained("CLIP-ViT-B-32")              # a folder of transformers or open_clip
    model = load_pretrained("ViT-B-32.pt")                # OpenAI's archive
    model = load_pretrained("epoch_32.pt", activation="gelu")  # open_clip's training checkpoint

Shapes tell sizes; a configuration beside the weights, rules about published weights (`rules.py`)
and arguments tell the rest. Anything left open is an error.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import CLIPConfig
from ..model import CLIP, is_checkpoint
from . import forms, weights
from .keys import State, convert

# Fields of CLIPConfig that shapes and keys do not tell.
OPTIONS = (
    "image_heads", "text_heads", "image_activation", "text_activation", "image_eps", "text_eps",
    "image_pool", "image_norm_after_pool", "text_pool", "end_id", "causal", "text_projection",
    "image_mean", "image_std", "image_resize", "image_interpolation",
)  # fmt: skip
NEEDED = ("image_heads", "text_heads", "image_activation", "text_activation", "image_pool",
          "text_pool", "causal")  # fmt: skip
TOLD_BY_SHAPES = ("embed_dim", "image_size", "patch_size", "image_width", "image_layers",
                  "image_mlp", "vocab_size", "context_length", "text_width", "text_layers",
                  "text_mlp", "image_norm_first")  # fmt: skip


class MissingOptions(ValueError):
    """The weights do not tell some fields of the configuration.

    names: these fields.
    problem: the error without the remedy, which a command line words differently.
    """

    def __init__(self, form: str, names: list[str]) -> None:
        self.names, self.problem = names, f"{form}: the weights do not tell {', '.join(names)}"
        remedy = "give the model's configuration (config=...), or "
        super().__init__(f"{self.problem}; {remedy}{', '.join(f'{name}=...' for name in names)}")


def load_pretrained(
    source: str | os.PathLike[str] | Mapping[str, Tensor], *,
    config: str | os.PathLike[str] | dict[str, Any] | None = None,
    activation: str | None = None, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", **options: Any,
) -> CLIP:  # fmt: skip
    """Returns a model with the weights of open_clip, OpenAI, transformers or `CLIP.save`.

    Args:
        source: a file (safetensors, torch.save's, a TorchScript archive), a folder that holds one
            under its usual name, or a state dict. Both towers must be ViTs or Transformers.
        config: open_clip's `open_clip_config.json` or transformers' `config.json`, read, or a path
            to it or to its folder. None: the one beside the weights, if there is one.
        activation: of both towers: "gelu", "gelu_tanh" or "quick_gelu".
        dtype: of the loaded weights, whatever the file has.
        options: fields of `CLIPConfig` that shapes do not tell, such as image_heads, text_heads,
            image_activation, text_activation, text_pool, causal. They replace what a
            configuration or a rule says.

    Returns:
        The model, in training mode as any new module.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights are of no known form; a key is missing, unknown or misshaped; the
            configuration contradicts the shapes; an option is needed to tell the model
            (MissingOptions); or the dtype is not floating-point.
        TypeError: an option is unknown.
    """
    if unknown := [name for name in options if name not in OPTIONS]:
        raise TypeError(f"options must be among {', '.join(OPTIONS)}, got {', '.join(unknown)}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating-point, got {dtype}")
    if activation is not None:
        options = {"image_activation": activation, "text_activation": activation, **options}
    beside = None
    if isinstance(source, Mapping):
        state: State = weights.state_dict(dict(source))
    else:
        path = weights.file_of(Path(source))
        if is_checkpoint(path):
            if options or config is not None:
                raise ValueError(f"{path} has its own configuration: give no options")
            return CLIP.load(path, device).to(dtype)
        state, beside = weights.read(path), path.parent
    state = forms.unwrapped(state)
    form = forms.recognise(state)
    given = weights.read_config(config, beside, form.CONFIG)
    found, told = form.facts(state, given)
    known = merged(found, told, options, form.NAME)
    model_config = CLIPConfig(**known)
    model = empty(model_config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    sources = form.sources(model_config, state)
    converted = convert(state, sources, shapes, form.NAME, form.HARMLESS, dtype, device)
    model.load_state_dict(converted, assign=True)
    return model


class WithoutNormal(TorchFunctionMode):
    """Skips `nn.init.normal_`, which draws nothing on the meta device, but imports TorchDynamo:
    more than a second."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is nn.init.normal_:
            return None
        return func(*args, **(kwargs or {}))


def empty(config: CLIPConfig) -> CLIP:
    """Returns a model without memory for its weights."""
    with torch.device("meta"), WithoutNormal():
        return CLIP(config)


def merged(
    found: dict[str, Any], told: dict[str, Any], options: dict[str, Any], form: str
) -> dict[str, Any]:
    """Returns the fields of the configuration: options before what the configuration told, before
    what shapes and rules found.

    Raises:
        ValueError: the configuration contradicts the shapes.
        MissingOptions: a field is left open.
    """
    contradictions = [
        f"{name} is {found[name]}, the configuration says {told[name]}"
        for name in TOLD_BY_SHAPES
        if name in found and name in told and found[name] != told[name]
    ]
    if contradictions:
        raise ValueError(f"the configuration is of another model: {'; '.join(contradictions)}")
    known = {**found, **told, **options}
    if known.get("text_pool") != "end" and "end_id" not in options:
        known.pop("end_id", None)
    if missing := [name for name in NEEDED if name not in known]:
        raise MissingOptions(form, missing)
    names = {field.name for field in fields(CLIPConfig)}
    assert known.keys() <= names, known.keys() - names
    return known
