"""Tells whether a class of the installed transformers has the form that its family describes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .family import Family, Tower
from .forward import Options, fused_forward, own_forward

_N, _D = 3, 4


def other_form(known: type, family: Family) -> str | None:
    """Returns how the class's own forward differs from the family, or None if it does not.

    Both forwards run on stand-ins for towers and projections, which record what they are called
    with: calls, features, logits and loss must be the same.
    """
    return _difference(own_forward(known), family)


@functools.lru_cache
def _difference(own: Callable[..., Any], family: Family) -> str | None:
    kinds = inspect.signature(own).parameters.values()
    names = {p.name for p in list(kinds)[1:] if p.kind is not p.VAR_KEYWORD}
    # return_dict may be an argument of its own or one of the further keywords.
    if names - {"return_dict"} != family.parameters() - {"return_dict"}:
        differing = ", ".join(sorted(names ^ family.parameters()))
        return f"its arguments differ: {differing}"
    try:
        fused = fused_forward(own, family, Options(keep_logits=True))
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            theirs, ours = (_run(forward, family, own.__module__) for forward in (own, fused))
    except Exception as error:
        return f"it fails on stand-ins, {type(error).__name__}: {error}"
    if theirs[1] != ours[1]:
        return "its towers are called with other arguments"
    if list(theirs[0]) != list(ours[0]):
        return f"its outputs are {', '.join(theirs[0])}"
    apart = [name for name, value in theirs[0].items() if not _same(value, ours[0][name])]
    return f"it computes other {', '.join(apart)}" if apart else None


def _run(forward: Any, family: Family, module: str) -> tuple[Any, list[Any]]:
    """Returns the outputs of a forward, and the calls of its towers."""
    calls: list[Any] = []
    config = SimpleNamespace(return_dict=True, output_segmentation=False)
    config.output_attentions, config.output_hidden_states = "attentions", "hidden states"
    model = SimpleNamespace(config=config, training=False)
    for k, tower in enumerate((family.other, family.text)):
        setattr(model, tower.attribute, _tower(tower, k, calls))
        if tower.projection is not None:
            setattr(model, tower.projection, lambda t, k=k: t.flip(-1) + (k + 1) / 8)
    for k, name in enumerate(family.similarity.parameters):
        setattr(model, name, torch.tensor([0.7 + k], dtype=torch.float64, device="cpu"))
    towers = {*family.other.inputs, *family.text.inputs} - {*family.from_config, "return_dict"}
    inputs = {name: name for name in towers}
    return forward(model, **inputs, return_loss=True, further="further"), calls


def _tower(tower: Tower, k: int, calls: list[Any]) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def stand_in(**inputs: Any) -> Any:
        calls.append((tower.attribute, inputs))
        hidden = _numbers(_N * 2 * _D, k).view(_N, 2, _D)
        return BaseModelOutputWithPooling(hidden, _numbers(_N * _D, k + 2).view(_N, _D))

    return stand_in


def _numbers(count: int, k: int) -> Tensor:
    return torch.sin(torch.arange(count, dtype=torch.float64, device="cpu") * (k + 1.7) + k)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    return all(_same(x, y) for x, y in zip(a.to_tuple(), b.to_tuple(), strict=True))
