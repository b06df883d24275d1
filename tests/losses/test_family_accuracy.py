"""Every loss of the family is as accurate as its dense twin in the same dtype, on hard inputs.

The truth (`support/family_truth.py`) is written from formulas, apart from the library. The dense
twins, which rank tests take as their truth, are judged by it in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.family import CASES, Arrays, as_rounded, evaluate, of_batch
from support.family_truth import truth
from support.hard_inputs import BATCHES
from support.judge import PRECISIONS, Precision, name_of, numbers, roundoff
from support.oracle import rounded
from torch import Tensor

from fastclip import loss, reference

SCALES = (14.3, 0.0, 100.0, -5.0, 1e4, 1.0, 1e-3)
N, D = 67, 16  # several tiles, and a multiple of no tile size
REDUCTIONS = ("mean", "none", "sum")


def plan(name: str, precision: str, count: int) -> Iterator[tuple[str, float, str]]:
    """Yields a case's batches with a scale and a reduction each. They rotate, so that the losses
    and precisions together meet all combinations."""
    start = list(CASES).index(name) + 3 * list(PRECISIONS).index(precision)
    batches = list(BATCHES)
    if CASES[name].has_ties:
        # The first one of equal pairs is taken, and rounding may make others equal.
        batches = ["random", "separated", "cone", "negative", "lengths"]
    for k in range(min(count, len(batches))):
        i = start + 2 * k if len(batches) % 2 else start + k
        yield batches[i % len(batches)], SCALES[(i + k) % len(SCALES)], REDUCTIONS[(start + k) % 3]


@functools.cache
def judges(
    name: str, precision: str, batch_name: str, scale: float, reduction: str, device: torch.device
) -> tuple[Arrays, dict, SimpleNamespace, dict[str, Tensor]]:
    """Returns the arrays, the options, the truth and the dense twin's results."""
    case, p = CASES[name], PRECISIONS[precision]
    given = of_batch(case, batch_name, N, D, scale)
    upstream: float | np.ndarray = 1.0
    if reduction == "none":  # gradients of either sign, some of them zero
        upstream = np.random.default_rng(7).normal(size=N).astype(np.float32).astype(float)
        upstream[::9] = 0
    options = {"normalize": batch_name == "zero_rows", "reduction": reduction, "upstream": upstream}
    exact = truth(case, as_rounded(given, p), **options)
    return given, options, exact, evaluate(case, reference, given, p, device, **options)


def bound(quantity: str, exact: SimpleNamespace, result: Tensor, p: Precision, rows: Any) -> float:
    """Returns the error of a careful computation, as `judge.allowance`, relative to the result."""
    right, condition = getattr(exact, quantity)[rows], exact.conditions[quantity]
    arithmetic = 4 * roundoff(p.scalars) * (1 + exact.largest_logit)
    weights = roundoff(p.product) if quantity in ("dx", "dy") else 0.0
    storage = np.linalg.norm(rounded(right, name_of(result.dtype)) - right)
    return condition * (arithmetic + weights) + float(storage / (np.linalg.norm(right) or 1.0))


def mistake(result: Tensor, right: NDArray) -> float:
    """Returns the error relative to a result, absolute if that is 0."""
    result = numbers(result)
    assert result.shape == right.shape
    if not np.isfinite(result).all():
        return float("inf")
    return float(np.linalg.norm(result - right) / (np.linalg.norm(right) or 1.0))


def check(
    name: str, precision: str, engine: str, count: int, device: torch.device, slack: float = 1.0
) -> None:
    case, p = CASES[name], PRECISIONS[precision]
    for batch_name, scale, reduction in plan(name, precision, count):
        given, options, exact, dense = judges(name, precision, batch_name, scale, reduction, device)
        ours = evaluate(case, loss, given, p, device, backend=engine, **options)
        for quantity, result in ours.items():
            right = getattr(exact, quantity)
            # Gradients of zero rows are divided by the norm's epsilon: in a common norm they would
            # hide all other rows.
            rows = ...
            if batch_name == "zero_rows" and quantity in ("dx", "dy"):
                rows = given[quantity[1:]].any(1)
            eps = slack * bound(quantity, exact, result, p, rows)
            assert result.dtype == dense[quantity].dtype
            ours_off, theirs_off = (
                mistake(one[rows], right[rows]) for one in (result, dense[quantity])
            )
            limit = eps + (theirs_off if theirs_off < 0.1 else 0.0)
            assert ours_off <= limit, (
                f"{quantity}, {batch_name}, scale {scale}, {reduction}: off by {ours_off:.3e}, "
                f"allowed {limit:.3e} (dense {theirs_off:.3e})"
            )


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "float64"])
@pytest.mark.parametrize("name", CASES)
def test_is_at_least_as_accurate_as_the_dense_twin(
    name: str, engine: str, precision: str, device: torch.device
) -> None:
    check(name, precision, engine, 3, device)


@pytest.mark.parametrize("name", CASES)
def test_every_hard_batch_in_float64(name: str, backend: str, device: torch.device) -> None:
    # The truth, too, is in float64.
    check(name, "float64", backend, len(BATCHES), device, slack=8)
