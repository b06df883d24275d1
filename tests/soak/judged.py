"""Judges the results of a soak's loss by the exact ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.family import Arrays, Case, as_rounded
from support.family_truth import truth
from support.judge import Precision, name_of, numbers, roundoff
from support.oracle import rounded
from torch import Tensor

# A soak looks for wrong results, not for inaccurate ones, which the tests of accuracy find: a
# result may be off by this many times the error of a careful computation, and by twice that of the
# dense loss in the same dtype.
SLACK, OF_DENSE = 8.0, 2.0
# In float32. Weights below 2^-126 are zeros, and so is much of a gradient that is hardly larger.
MOST_LOGIT, FLUSHED = 5e8, 1e-34
# Results whose truth is that small are rounding errors of what cancels.
MOST_OF_NOTHING = 1e-3


def exact_of(
    case: Case, given: Arrays, p: Precision, normalize: bool, reduction: str, upstream: Any
) -> SimpleNamespace:
    with np.errstate(all="ignore"):
        return truth(
            case, as_rounded(given, p), normalize=normalize, reduction=reduction, upstream=upstream
        )


def undecided(case: Case, given: Arrays, p: Precision, normalize: bool) -> bool:
    """True if rounding decides which pairs a loss counts."""
    arrays = as_rounded(given, p)
    x, y = (_unit(arrays[k]) if normalize else arrays[k] for k in ("x", "y"))
    t = x @ y.T
    own = t.diagonal()
    near = 1e-5 if roundoff(p.scalars) > 1e-12 else 1e-12
    if case.option("hardest") and len(t) > 2:
        others = t - 4 * np.eye(len(t)) * (1 + np.abs(t).max())
        tops = [np.sort(others, dim).take((-2, -1), dim) for dim in (0, 1)]
        if min(np.diff(top, axis=k).min() for k, top in enumerate(tops)) < near:
            return True
    margins = case.option("false_negative_margin"), -case.option("margin", 0.2)
    margin = margins[0] if margins[0] is not None else margins[1]
    gaps = [np.abs(t - own.reshape(shape) - margin).min() for shape in ((-1, 1), (1, -1))]
    return min(gaps) < near


def mistakes(
    found: dict[str, Tensor], dense: dict[str, Tensor] | None, exact: SimpleNamespace, p: Precision,
    given: Arrays, is_dense: bool = False,
) -> list[str]:  # fmt: skip
    """Returns a line for each wrong quantity of `family.evaluate`. is_dense: the results, too, are
    those of the dense loss, which loses what lies below its dtype's resolution."""
    wrong = []
    if roundoff(p.scalars) > 1e-12 and exact.largest_logit > MOST_LOGIT:
        return wrong  # documented: such lines may be NaN
    for name, result in found.items():
        right, mine = getattr(exact, name), numbers(result)
        if mine.shape != right.shape:
            wrong.append(f"{name}: shape {mine.shape} instead of {right.shape}")
            continue
        rows = ...
        if name in ("dx", "dy"):  # gradients of zero rows are those of the norm's epsilon
            rows = given[name[1:]].any(1)
        off, limit = _off(mine[rows], right[rows]), bound(name, exact, result, p, rows, given)
        theirs = _off(numbers(dense[name])[rows], right[rows]) if dense else 0.0
        flushed = roundoff(p.scalars) > 1e-12 and np.linalg.norm(right[rows]) < FLUSHED
        if flushed:
            off, coarsest = _remainder(name, mine[rows], rows, given), 4 * roundoff(p.scalars)
            if name in ("dx", "dy"):  # weights or parts were rounded before they cancelled
                coarsest = max(coarsest, roundoff(p.product), roundoff(result.dtype))
            size = 1 + exact.largest_logit
            # dscale adds products, times weights that rounded logits have moved.
            limit = MOST_OF_NOTHING + SLACK * coarsest * size * (size if name == "dscale" else 1)
        elif limit >= 1:  # at the largest logits the bound says nothing
            continue
        else:
            limit = SLACK * limit + (OF_DENSE * theirs if theirs < 0.1 or is_dense else 0.0)
        if not off <= limit:
            wrong.append(f"{name}: off by {off:.2e}, allowed {limit:.2e} (dense {theirs:.2e})")
    return wrong


def bound(
    name: str, exact: SimpleNamespace, result: Tensor, p: Precision, rows: Any, given: Arrays
) -> float:
    """Returns the relative error of a careful computation, as `judge.allowance` does."""
    right = getattr(exact, name)[rows]
    # An infinite loss, of a line without negatives, has no condition.
    condition = np.nan_to_num(exact.conditions[name], nan=1.0)
    arithmetic = 4 * roundoff(p.scalars) * (1 + exact.largest_logit)
    weights = roundoff(p.product) if name in ("dx", "dy") else 0.0
    finite = np.where(np.isfinite(right), right, 0)
    storage = np.linalg.norm(rounded(finite, name_of(result.dtype)) - finite)
    length = float(np.linalg.norm(finite)) or 1.0
    if name in ("loss", "dweights"):  # a log-sum-exp has an absolute error, even if tiny
        lines = len(given["x"]) if right.ndim == 0 else right.size**0.5
        storage += 2 * roundoff(p.scalars) * lines
    return condition * (arithmetic + weights) + float(storage / length)


def _off(mine: NDArray, right: NDArray) -> float:
    """Returns the error relative to the result, absolute if that is 0; infinite unless both are
    finite in the same places."""
    finite = np.isfinite(right)
    if not np.array_equal(finite, np.isfinite(mine)):
        return float("inf")
    mine, right = mine[finite], right[finite]
    return float(np.linalg.norm(mine - right) / (np.linalg.norm(right) or 1.0))


def _remainder(name: str, mine: NDArray, rows: Any, given: Arrays) -> float:
    """Returns the length of a result whose truth is zero. Gradients of a short row are divided by
    its length if it is normalised, and so are their rounding errors."""
    if name in ("dx", "dy"):
        length = np.linalg.norm(given[name[1:]][rows], axis=1, keepdims=True)
        mine = mine * np.minimum(length, 1)
    return float(np.linalg.norm(mine))


def _unit(x: NDArray) -> NDArray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
