"""The forward of a two-tower model with a fused loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ... import distributed, loss
from ..host import Host
from .family import Family

HOST = Host("transformers", ("5",))


@dataclass(frozen=True)
class Options:
    """How a model is fused: the keywords of `fuse` and `patch`."""

    keep_logits: bool = False
    across_ranks: bool = True
    uneven: bool = True

    def losses(self, model: Any) -> tuple[ModuleType, dict[str, Any]]:
        """Returns the module whose functions compute the loss of this step, and their options.

        A step of training is one with gradients in train mode. An evaluation may run on some of the
        ranks only, so it exchanges nothing.
        """
        training = model.training and torch.is_grad_enabled()
        if self.across_ranks and training and _ranks() > 1:
            return distributed, {"uneven": self.uneven}
        return loss, {}


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_forward(known: type) -> Callable[..., Any]:
    """Returns the forward that transformers gave a class, whether it is patched or not."""
    return getattr(known.forward, "_fastclip_own", known.forward)


def fused_forward(own: Callable[..., Any], family: Family, options: Options) -> Callable[..., Any]:
    """Returns a forward that computes the loss with fastclip, and else what `own` returns."""
    signature = inspect.signature(own)
    parameters = [p for p in list(signature.parameters.values())[1:] if p.kind is not p.VAR_KEYWORD]
    names = [p.name for p in parameters]
    defaults = {p.name: p.default for p in parameters}
    output = getattr(family.module(), family.output)
    lengths = _lengths if family.norm is None else getattr(family.module(), family.norm)

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        twice = any(name in kwargs for name in names[: len(args)])
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if twice or len(args) > len(names) or not _has_loss(family, given):
            return own(self, *args, **kwargs)
        for name in (*family.from_config, "return_dict"):
            if given.get(name) is None:
                given[name] = getattr(self.config, name)
        for name in family.unless:
            if given[name]:
                HOST.falls_back(f"{family.name} was called with {name}")
                return own(self, *args, **kwargs)
        rest = {k: v for k, v in kwargs.items() if k not in names and k != "return_dict"}
        values = _values(self, family, options, lengths, given, rest)
        if given["return_dict"]:
            return output(**values)
        # As everywhere in transformers, tuples leave out what is None.
        found = [v for v in values.values() if v is not None]
        return tuple(v.to_tuple() if hasattr(v, "to_tuple") else v for v in found)

    # Accelerate unwraps functions as far as `__wrapped__` leads, which would undo this.
    del forward.__wrapped__
    forward.__signature__ = signature
    forward._fastclip_own = own
    return forward


def _has_loss(family: Family, given: Mapping[str, Any]) -> bool:
    towers = family.other, family.text
    return bool(given["return_loss"]) and all(tower.given(given) for tower in towers)


def _values(
    model: Any, family: Family, options: Options, lengths: Callable[[Tensor], Tensor],
    given: Mapping[str, Any], rest: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Returns the fields of the output, in its order. The towers run in transformers' order, so
    that random numbers are the same."""
    x_outputs, x = family.other.encode(model, given, rest)
    text_outputs, text = family.text.encode(model, given, rest)
    x, text = x / lengths(x), text / lengths(text)
    if family.same_dtype:
        x = x.to(text)
    there = x.to(text.device)
    where, how = options.losses(model)
    value = family.similarity.loss(model, there, text, where, **how)
    logits = family.similarity.logits(model, there, text) if options.keep_logits else (None, None)
    tower = {"image": "vision"}.get(family.sort, family.sort)
    return {
        "loss": value, f"logits_per_{family.sort}": logits[0], "logits_per_text": logits[1],
        "text_embeds": text, f"{family.sort}_embeds": x, "text_model_output": text_outputs,
        f"{tower}_model_output": x_outputs,
    }  # fmt: skip


def _lengths(features: Tensor) -> Tensor:
    return features.norm(p=2, dim=-1, keepdim=True)
