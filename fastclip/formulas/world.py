"""The world of a loss: one process, or ranks that share a batch; and reductions in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.checks import check_reduction, check_weights
from ..engine.dtypes import product_dtype
from ..kinds import LineStatistics


def _unchanged(value: Tensor) -> Tensor:
    return value


def _unguarded(check: Callable[[], Any]) -> Any:
    return check()


class Batch(NamedTuple):
    """The pairs of all ranks, with gradients, and where this rank's own begin."""

    x: Tensor
    y: Tensor
    x_ids: Tensor | None
    y_ids: Tensor | None
    start: int


def _own_batch(x: Tensor, y: Tensor, ids: tuple[Tensor, Tensor] | None) -> Batch:
    return Batch(x, y, *(ids or (None, None)), 0)


class World(NamedTuple):
    """The functions and numbers that a formula needs beside its inputs.

    contrast: `fastclip.contrast` or `fastclip.distributed.contrast`, with normalize, backend and
        the ranks' options already given.
    memory_budget: of the whole loss.
    check_engine: raises for a backend or a budget with which `contrast` of x and y would raise.
    guarded: calls a check of arguments; if it raises, all ranks raise.
    total: sums a tensor over ranks, without a gradient.
    gather: concatenates the ranks' rows, without a gradient.
    gathered: maps own pairs x, y and their ids to the batch of all ranks, with gradients.
    ranks: how many share the batch.
    """

    contrast: Callable[..., LineStatistics]
    memory_budget: int | None
    check_engine: Callable[[Tensor, Tensor], None]
    guarded: Callable[[Callable[[], Any]], Any] = _unguarded
    total: Callable[[Tensor], Tensor] = _unchanged
    gather: Callable[[Tensor], Tensor] = _unchanged
    gathered: Callable[..., Batch] = _own_batch
    ranks: int = 1
    even: bool = True  # all ranks have the same number of rows


def takes_lines(
    live: tuple[int, int] | None, ids: Any, label_smoothing: float, weights: Tensor | None,
    same_id: str = "ignore", reduction: str = "mean",
) -> bool:  # fmt: skip
    """True if a loss has options that the operators of fused losses do not have, so that it is
    computed from line statistics. Raises ValueError for `live` with such an option."""
    has = ids is not None or weights is not None or label_smoothing != 0
    has = has or same_id != "ignore" or reduction != "mean"
    if has and live is not None:
        raise ValueError(
            "live must be None with ids, label_smoothing, weights or, across ranks, a reduction "
            f"other than 'mean', got live={live!r}"
        )
    return has


class Reduction(NamedTuple):
    """The reduction of the losses of lines, and their weights (M); None: all 1."""

    name: str = "mean"
    weights: Tensor | None = None

    def check(self, x: Tensor, world: World) -> None:
        check_reduction(self.name)
        check_weights(self.weights, x)
        divides = self.name == "mean" and world.ranks > 1
        if divides and self.weights is not None and self.weights.requires_grad:
            # The mean divides by the sum of all ranks' weights.
            raise ValueError("weights must not require a gradient across ranks, got some that do")

    def of(
        self, losses: Tensor, world: World, inputs: tuple[Tensor, Tensor],
        counts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Reduces losses (M) of own lines. counts: bool (M), the lines that count; the losses of
        others are 0. The mean over ranks of the results is the result of one process."""
        dtype = torch.float64 if product_dtype(*inputs) == torch.float64 else torch.float32
        weights = self.weights if counts is None else counts.to(losses.dtype)
        if self.weights is not None:
            weights = self.weights.to(losses.dtype) * (1 if counts is None else weights)
            losses = losses * weights
        if self.name == "none":
            return losses.to(dtype)
        total = losses.sum() * world.ranks
        if self.name == "sum":
            return total.to(dtype)
        if weights is None and world.even:
            return (total / (losses.shape[0] * world.ranks)).to(dtype)
        if weights is None:
            weights = torch.ones_like(losses)
        number = weights.sum()
        number = number if world.ranks == 1 else world.total(number.detach().clone())
        # Without any line that counts the loss is 0.
        return (total / torch.where(number == 0, 1, number)).to(dtype)
