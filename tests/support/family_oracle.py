"""The oracle of statistics with a teacher, a guide, limits, hinges and hardest negatives.

As `statistics_oracle.py` it uses NumPy alone and no autograd.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from support.statistics_oracle import Exact, Problem, _softmax, _unit

# Kinds whose lines have a level: the own positive's logit plus `above`.
LEVELLED = ("hinge", "hardest")


class ExactBeside(Exact):
    """The exact statistics and gradients of a problem with something beside its features.

    targets: (x', y', scale'). guide: (x', y'). limits: (M). above: for `kind="hinge"`, sums of
    hinges, and for "hardest", the hinge of each line's first largest negative.
    """

    def __init__(
        self, problem: Problem, *, targets: tuple[NDArray, NDArray, float] | None = None,
        guide: tuple[NDArray, NDArray] | None = None, limits: NDArray | None = None,
        above: float = 0.0,
    ) -> None:  # fmt: skip
        guided = guide is not None or limits is not None
        super().__init__(replace(problem, margin=None) if guided else problem)
        self.above, self.teacher = above, None
        if guided:
            sides = guide or self.raw
            hats = [_unit(side) if problem.normalize else side for side in sides]
            self._leave_out(hats[0] @ hats[1].T, limits, problem.margin)
        if targets is not None:
            x, y = (_unit(side) if problem.normalize else side for side in targets[:2])
            self.teacher = targets[2] * (x @ y.T)
            every = np.ones_like(self.own)
            self.counts |= {"row_expectations": every, "column_expectations": every}

    def _leave_out(self, t: NDArray, limits: NDArray | None, margin: float | None) -> None:
        """Takes negatives that are too similar out of their lines."""
        if limits is not None:
            self.counts["rows"] = self.counts["rows"] & ~(t > limits[:, None])
            return
        limit = np.where(self.own, t + margin, -np.inf)
        for name, dim in (("rows", 1), ("columns", 0)):
            if dim == 1 or self.problem.labels is None:
                top = limit.max(dim, keepdims=True)
                kept = ~(t > np.where(np.isfinite(top), top, np.inf))
                self.counts[name] = self.counts[name] & kept

    def _levels(self, dim: int) -> NDArray:
        """The level of each line; infinite for a line without an own positive."""
        own = self.own
        if self.problem.labels is not None and dim == 0:
            own = np.zeros_like(own)
        level = np.where(own, self.s, 0).sum(dim, keepdims=True) + self.above
        return np.where(own.any(dim, keepdims=True), level, np.inf)

    def _hinges(self, name: str) -> tuple[NDArray, int]:
        """How far each pair lies above its line's level, 0 for pairs that do not count."""
        dim = 0 if name == "columns" else 1
        counts = self.counts[name]
        if self.problem.kind == "hardest":
            s = np.where(counts, self.s, -np.inf)
            first = np.zeros_like(counts)
            np.put_along_axis(first, np.expand_dims(s.argmax(dim), dim), True, dim)
            counts = counts & first
        return np.where(counts, np.maximum(self.s - self._levels(dim), 0), 0), dim

    def _levelled(self, name: str) -> bool:
        return self.problem.kind in LEVELLED and name in ("rows", "columns")

    def _value(self, name: str) -> NDArray:
        if name.endswith("expectations"):
            return (self._derivative(name) * self.s).sum(0 if name.startswith("column") else 1)
        if self._levelled(name):
            hinges, dim = self._hinges(name)
            return hinges.sum(dim)
        return super()._value(name)

    def _derivative(self, name: str) -> NDArray:
        if name.endswith("expectations"):
            every = self.counts[name]
            return _softmax(self.teacher, every, 0 if name.startswith("column") else 1)
        if self._levelled(name):
            hinges, dim = self._hinges(name)
            above = (hinges > 0).astype(float)
            return above - np.where(self.own, above.sum(dim, keepdims=True), 0)
        return super()._derivative(name)
