"""The products of a block's targets, and the right results of a teacher, dense in float64."""

from functools import cached_property

import torch
from support.dense_block import DENSE_KINDS, Block
from support.rounding import product_error
from torch import Tensor

SOFTMAX = DENSE_KINDS["softmax"]
ROWS = 3  # that a teacher adds to a state


def scaled_targets(block: Block) -> list[Tensor]:
    """Returns both sides' targets times their factors."""
    sides = (block.target_x, block.target_factor_x), (block.target_y, block.target_factor_y)
    return [
        features.double() * (1 if factor is None else factor.double()[:, None])
        for features, factor in sides
    ]


def target_products(block: Block) -> Tensor | None:
    """Returns t' (M, N), or None for a block without targets."""
    if block.target_x is None:
        return None
    x, y = scaled_targets(block)
    return x @ y.T


class Teacher:
    """The weights by which a teacher averages the products t of a block."""

    def __init__(self, block: Block, t: Tensor) -> None:
        self.block, self.t = block, t
        self.logits = float(block.target_scale) * target_products(block)

    @cached_property
    def expectations(self) -> Tensor:
        """(M + N): each line's mean of t, weighed by the softmax of the logits."""
        p = [self.logits.softmax(dim) for dim in (1, 0)]
        return torch.cat([(p[0] * self.t).sum(1), (p[1] * self.t).sum(0)])

    @cached_property
    def logarithms(self) -> Tensor:
        """(M + N): log2 of each line's sum of exponentials."""
        every = torch.ones_like(self.t, dtype=torch.bool)
        return torch.cat([SOFTMAX.statistic(self.logits, every, dim) for dim in (1, 0)])

    def weights(self, shifts: Tensor, coefficients: Tensor) -> Tensor:
        """Returns (M, N), the weights of the pairs."""
        a, b = coefficients.split(self.t.shape)
        row, column = shifts.split(self.t.shape)
        of_row = SOFTMAX.activation(self.logits, row[:, None]) * a[:, None]
        return of_row + SOFTMAX.activation(self.logits, column) * b

    @cached_property
    def largest(self) -> float:
        """A bound of the logits."""
        norms = [float(features.norm(dim=1).max()) for features in scaled_targets(self.block)]
        return abs(float(self.block.target_scale)) * norms[0] * norms[1]

    @property
    def arithmetic(self) -> float:
        """The error of an exponential, with that of its product."""
        return product_error(self.block.target_x) * (1 + self.largest)

    def assert_states(self, state: Tensor, t_error: float, t_bound: float, what: str) -> None:
        """Asserts that the rows of the state are right. t has an error and a bound."""
        shifts, sums, moments = state
        assert (sums > 0).all(), f"{what}: the teacher weighs every pair"
        off = float((torch.log2(sums) + shifts - self.logarithms).abs().max())
        # The truth, too, is a rounded logarithm of about ten.
        allowed = self.arithmetic + 1e-15 * (10 + self.largest)
        assert off <= allowed, f"{what}: the teacher's sums off by {off:.2e}, allowed {allowed:.2e}"
        off = float((moments / sums - self.expectations).abs().max())
        allowed = t_error + self.arithmetic * t_bound
        assert off <= allowed, f"{what}: expectations off by {off:.2e}, allowed {allowed:.2e}"
