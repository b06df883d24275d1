"""The gradients of a loss, and the scalar whose backward sends those of a micro-batch on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .outputs import Outputs


class Evaluated(NamedTuple):
    value: Tensor  # the loss
    scaled: Tensor  # times the factor of a scaler, if there is one
    leaves: list[Tensor]


class Gradients(NamedTuple):
    value: Tensor  # the loss, detached
    of_outputs: tuple[Tensor | None, ...]
    of_leaves: list[tuple[Tensor, Tensor]]  # other leaves, such as the loss's own parameters


def evaluated(loss: Callable[..., Any], whole: Outputs, scaler: Any) -> Evaluated:
    """Returns the loss of a batch's outputs, which are leaves, with the leaves of its graph."""
    with torch.enable_grad():
        value = whole.of_loss(loss)
        scaled = value if scaler is None else scaler.scale(value)
    leaves = leaves_of(scaled)
    if not leaves:
        raise ValueError("the loss must depend on the model's outputs, got one without a graph")
    return Evaluated(value, scaled, leaves)


def gradients_of(loss: Evaluated, whole: Outputs) -> Gradients:
    """Returns the gradients of a loss, scaled if there is a scaler."""
    found = torch.autograd.grad(loss.scaled, loss.leaves, allow_unused=True)
    by_leaf = {id(x): g for x, g in zip(loss.leaves, found, strict=True)}
    of_outputs = tuple(by_leaf.pop(id(x), None) for x in whole.values)
    others = [(x, by_leaf[id(x)]) for x in loss.leaves if by_leaf.get(id(x)) is not None]
    return Gradients(loss.value.detach(), of_outputs, others)


def leaves_of(value: Tensor) -> list[Tensor]:
    """Returns the leaves of a graph: the tensors that a backward would give a gradient."""
    found: list[Tensor] = []
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            found.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        divisor: Tensor | None,
        gradients: Sequence[Tensor],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.divisor, ctx.gradients = divisor, gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # In float32 at least: a half would round a factor such as 1 / 3, and lose a scaler's.
        factor = upstream.to(torch.promote_types(upstream.dtype, torch.float32))
        if ctx.divisor is not None:
            factor = factor / ctx.divisor
        return (
            None,
            None,
            None,
            *(
                (g.to(torch.promote_types(g.dtype, factor.dtype)) * factor.to(g.device)).to(g.dtype)
                for g in ctx.gradients
            ),
        )


def surrogate(
    value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor], divisor: Tensor | None
) -> Tensor:
    """Returns a scalar with this value. Its gradient with respect to each tensor is the given one
    over `divisor`, which undoes a scale that the gradients have."""
    return _Surrogate.apply(value, divisor, gradients, *tensors)
