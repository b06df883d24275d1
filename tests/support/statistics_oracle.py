"""The oracle of line statistics and all their gradients, written from the formulas.

Like `oracle.py` it uses only NumPy, no autograd and nothing of fastclip. It is dense and slow.

A statistic sums over those pairs of a line that a mask admits. With upstream gradients g of
statistics S, pair (i, j) has the weight `w_ij = g_i * dS_i/ds_ij + g_j * dS_j/ds_ij`, summed over
all statistics of its row i and its column j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from support.oracle import NORM_EPS


def _softplus_sum(s: NDArray, counts: NDArray, dim: int) -> NDArray:
    return np.where(counts, np.maximum(s, 0) + np.log1p(np.exp(-np.abs(s))), 0).sum(dim)


def _sigmoid(s: NDArray, counts: NDArray, dim: int) -> NDArray:
    small = np.exp(-np.abs(s))
    return np.where(counts, np.where(s >= 0, 1, small) / (1 + small), 0)


def _log_sum_exp(s: NDArray, counts: NDArray, dim: int) -> NDArray:
    s = np.where(counts, s, -np.inf)
    top = s.max(dim, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return (np.log(np.exp(s - top).sum(dim, keepdims=True)) + top).squeeze(dim)


def _softmax(s: NDArray, counts: NDArray, dim: int) -> NDArray:
    value = np.expand_dims(_log_sum_exp(s, counts, dim), dim)
    exponent = s - np.where(np.isfinite(value), value, np.inf)
    return np.exp(np.where(counts, exponent, -np.inf))


def _members(s: NDArray, counts: NDArray, dim: int) -> tuple[NDArray, NDArray]:
    """Returns the pairs that a mean counts, and how many these are in each line."""
    counts = counts & (s > -np.inf)
    return counts, counts.sum(dim, keepdims=True)


def _mean(s: NDArray, counts: NDArray, dim: int) -> NDArray:
    counts, number = _members(s, counts, dim)
    with np.errstate(invalid="ignore"):
        return (np.where(counts, s, 0).sum(dim, keepdims=True) / number).squeeze(dim)


def _share(s: NDArray, counts: NDArray, dim: int) -> NDArray:
    counts, number = _members(s, counts, dim)
    return counts / np.maximum(number, 1)


class Kind(NamedTuple):
    """Functions that return each line's statistic, and its derivative with respect to each logit.

    Their arguments are the logits, the mask of pairs that count, and the axis to sum over.
    """

    statistic: Callable[[NDArray, NDArray, int], NDArray]
    derivative: Callable[[NDArray, NDArray, int], NDArray]
    sign_of_positives: int  # of their logits
    is_relative: bool  # errors are judged relative to the statistic


KINDS = {
    "softmax": Kind(_log_sum_exp, _softmax, 1, is_relative=False),
    "sigmoid": Kind(_softplus_sum, _sigmoid, -1, is_relative=True),
}
MEAN = Kind(_mean, _share, 1, is_relative=False)
NAMES = (
    "rows", "columns", "positives", "row_positives", "column_positives", "row_means",
    "column_means", "row_positive_means", "column_positive_means",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    x: NDArray  # (M, D)
    y: NDArray | None  # (N, D); None: x
    scale: float
    bias: float = 0.0
    key_bias: NDArray | None = None  # (N)
    offset: int | None = 0
    labels: NDArray | None = None  # (M)
    ids: tuple[NDArray, NDArray] | None = None
    same_id: str = "ignore"
    margin: float | None = None
    kind: str = "softmax"
    normalize: bool = False
    means: bool = False

    def with_sides(self, x: NDArray, y: NDArray) -> Problem:
        return replace(self, x=x, y=y)


@dataclass(frozen=True)
class Gradients:
    dx: NDArray
    dy: NDArray | None
    dscale: NDArray
    dbias: NDArray
    dkey_bias: NDArray
    conditions: dict[str, float]


class Exact:
    """The exact statistics and gradients of a problem, from its full matrices."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.one_set = problem.y is None
        sides = (problem.x, problem.x if self.one_set else problem.y)
        self.raw = [np.asarray(side, np.float64) for side in sides]
        self.hats = [_unit(side) if problem.normalize else side for side in self.raw]
        self.t = self.hats[0] @ self.hats[1].T
        self.s = problem.scale * self.t + problem.bias
        if problem.key_bias is not None:
            self.s = self.s + problem.key_bias
        self.own = self._own()
        same = self.own.copy()
        if problem.ids is not None:
            same |= problem.ids[0][:, None] == problem.ids[1]
        by_row, by_column = ~same, ~same
        if problem.margin is not None:
            limit = np.where(self.own, self.t + problem.margin, -np.inf)
            # A column may be the label of several rows; it has no limit.
            sides = ((1, by_row), (0, by_column)) if problem.labels is None else ((1, by_row),)
            for dim, by_line in sides:
                top = limit.max(dim, keepdims=True)
                by_line &= ~(self.t > np.where(np.isfinite(top), top, np.inf))
        # A feature is no positive of itself.
        positive = same & ~self.own if self.one_set else same
        pairs = ~same if self.one_set else ~same | self.own
        self.counts = {"rows": by_row, "columns": by_column}
        if problem.same_id == "positive":
            self.counts |= {"row_positives": positive, "column_positives": positive}
            pairs = pairs | positive
        if problem.means:
            self.counts |= {"row_means": pairs, "column_means": pairs}
        if problem.means and problem.same_id == "positive":
            self.counts |= {"row_positive_means": positive, "column_positive_means": positive}
        if self.one_set:
            self.counts = {name: c for name, c in self.counts.items() if name.startswith("row")}

    def _own(self) -> NDArray:
        """The mask of own positives, or of the pairs of features with themselves."""
        p, (m, n) = self.problem, self.t.shape
        own, i = np.zeros((m, n), bool), np.arange(m)
        if p.labels is not None:
            own[i, p.labels] = True
        elif p.offset is not None:
            inside = (i + p.offset >= 0) & (i + p.offset < n)
            own[i[inside], i[inside] + p.offset] = True
        return own

    def statistics(self) -> dict[str, NDArray]:
        found = {name: self._value(name) for name in self.counts}
        if self.one_set:
            return found
        positives = np.where(self.own, self.s, 0).sum(1)
        found["positives"] = np.where(self.own.any(1), positives, np.nan)
        return found

    def _line(self, name: str) -> tuple[Kind, int, int]:
        """Returns the kind, the sign of logits in the statistic, and the axis to sum over."""
        kind = MEAN if name.endswith("means") else KINDS[self.problem.kind]
        sign = kind.sign_of_positives if name.endswith("positives") else 1
        return kind, sign, 0 if name.startswith("column") else 1

    def _value(self, name: str) -> NDArray:
        kind, sign, dim = self._line(name)
        return kind.statistic(sign * self.s, self.counts[name], dim)

    def _derivative(self, name: str) -> NDArray:
        """Returns the derivative of each line's statistic with respect to each of its logits."""
        kind, sign, dim = self._line(name)
        return sign * kind.derivative(sign * self.s, self.counts[name], dim)

    def gradients(self, upstream: dict[str, NDArray]) -> Gradients:
        """Returns the gradients for upstream gradients of some statistics, by name."""
        w = np.zeros_like(self.t)
        size = np.zeros_like(self.t)
        for name, g in upstream.items():
            if name == "positives":
                part = np.where(self.own, np.nan_to_num(g)[:, None], 0)
            else:
                dim = 0 if name.startswith("column") else 1
                part = np.expand_dims(g, dim) * self._derivative(name)
            w, size = w + part, size + np.abs(part)
        p, (xhat, yhat) = self.problem, self.hats
        results: dict[str, NDArray | None] = {"dy": None}
        conditions = {}
        sides = [("dx", w, size, yhat), ("dy", w.T, size.T, xhat)]
        found = [
            (name, p.scale * (weights @ other), abs(p.scale) * (sizes @ np.abs(other)))
            for name, weights, sizes, other in sides
        ]
        if self.one_set:
            (_, *of_rows), (_, *of_columns) = found
            found = [("dx", *(a + b for a, b in zip(of_rows, of_columns, strict=True)))]
        for (name, d, bound), mine, raw in zip(found, self.hats, self.raw, strict=False):
            if p.normalize:
                lengths = np.linalg.norm(raw, axis=1, keepdims=True)
                # A shorter row is divided by a constant.
                mine = np.where(lengths < NORM_EPS, 0, mine)
                lengths = np.maximum(lengths, NORM_EPS)
                d = (d - (d * mine).sum(1, keepdims=True) * mine) / lengths
                along = (bound * np.abs(mine)).sum(1, keepdims=True) * np.abs(mine)
                bound = (bound + along) / lengths
            results[name], conditions[name] = d, _ratio(bound, d)
        results["dscale"] = (w * self.t).sum()
        conditions["dscale"] = _ratio(
            (size * (np.abs(xhat) @ np.abs(yhat).T)).sum(), results["dscale"]
        )
        results["dbias"], conditions["dbias"] = w.sum(), _ratio(size.sum(), w.sum())
        results["dkey_bias"] = w.sum(0)
        conditions["dkey_bias"] = _ratio(size.sum(0), w.sum(0))
        return Gradients(**results, conditions=conditions)

    @property
    def largest_logit(self) -> float:
        """A bound of the logits, in proportion to which errors of exponentials grow."""
        longest = [np.linalg.norm(side, axis=1).max() for side in self.hats]
        biases = abs(self.problem.bias)
        if self.problem.key_bias is not None:
            finite = self.problem.key_bias[np.isfinite(self.problem.key_bias)]
            biases += np.abs(finite).max(initial=0.0)
        return float(abs(self.problem.scale) * longest[0] * longest[1] + biases)


def _unit(x: NDArray) -> NDArray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), NORM_EPS)


def _ratio(size: NDArray, result: NDArray) -> float:
    """Returns |size| / |result|, or max(|size|, 1) if the result is 0: errors are absolute then."""
    size, result = float(np.linalg.norm(size)), float(np.linalg.norm(result))
    return size / result if result else max(size, 1.0)
