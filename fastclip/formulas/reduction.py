"""The reduction of the losses of lines, in a world."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.checks import check_reduction, check_weights
from ..engine.dtypes import product_dtype
from .world import World


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
