"""Problems for `contrast`, and comparisons of its results with the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from support.judge import name_of, roundoff
from support.oracle import rounded
from support.statistics_oracle import KINDS, NAMES, Exact, Problem
from torch import Tensor

import fastclip
from fastclip.kinds import LineStatistics

SUMS = ("rows", "columns", "row_positives", "column_positives")

# Each option alone, and all of them together.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no positives": {"offset": None},
    "aside": {"offset": -4},
    "ids": {"ids": 7},
    "positives by id": {"ids": 7, "same_id": "positive"},
    "positives by id alone": {"ids": 7, "same_id": "positive", "offset": None},
    "margin": {"margin": -0.2},
    "key bias": {"key_bias": 2.0},
    "masked keys": {"key_bias": 2.0, "masked": 0.3, "means": True},
    "means": {"means": True, "ids": 7, "offset": 2},
    "means of positives": {"means": True, "ids": 7, "same_id": "positive", "offset": -3},
    "labels": {"labels": True, "margin": -0.1},
    "itself": {"one_set": True, "means": True},
    "itself and ids": {"one_set": True, "means": True, "ids": 6},
    "itself, positives by id": {
        "one_set": True, "means": True, "ids": 6, "same_id": "positive",
    },
    "everything": {
        "ids": 9, "same_id": "positive", "margin": -0.1, "key_bias": 1.0, "offset": 3,
        "means": True,
    },
    "everything, labels": {
        "ids": 9, "same_id": "positive", "margin": -0.1, "key_bias": 1.0, "masked": 0.2,
        "labels": True, "means": True,
    },
}  # fmt: skip


def make_problem(
    m: int, n: int, d: int, *, seed: int = 0, ids: int | None = None, key_bias: float | None = None,
    masked: float = 0.0, labels: bool = False, one_set: bool = False,
    dtype: torch.dtype = torch.float32, **options: Any,
) -> Problem:  # fmt: skip
    """Returns a problem whose own positives stand out.

    Features have unit length, or any length with `normalize`. `ids` is the number of different ids,
    `key_bias` the size of the biases and `masked` the share of keys that they take out. With
    `one_set` there is no y and n has no effect.
    """
    rng = np.random.default_rng(seed)
    n = m if one_set else n
    x, y = (rng.normal(size=(k, d)) for k in (m, n))
    x, y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, y))
    offset = options.get("offset", 0)
    columns = rng.integers(0, n, m) if labels else None
    if columns is not None:
        x = y[columns] + 0.5 * x
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    elif offset is not None:
        i = np.arange(max(0, -offset), max(0, -offset, min(m, n - offset)))
        y[i + offset] = x[i] + 0.5 * y[i + offset]
    if options.get("normalize"):
        x, y = (side * np.exp(rng.normal(size=(len(side), 1))) for side in (x, y))
    else:
        y = y / np.linalg.norm(y, axis=1, keepdims=True)
    x, y = (rounded(side, name_of(dtype)) for side in (x, y))
    given: dict[str, Any] = {"scale": 14.3, "bias": -1.5} | options
    if ids is not None:
        # Ids differ by multiples of 2^40, so that their low 32 bits are equal.
        of_x, of_y = (rng.integers(0, ids, k) * (1 << 40) - 5 for k in (m, n))
        of_x = of_y if one_set else of_x if columns is None else of_y[columns]
        given["ids"] = of_x, of_y
    if key_bias is not None:
        given["key_bias"] = rounded(key_bias * rng.normal(size=n), "float32")
        given["key_bias"][rng.random(n) < masked] = -np.inf
    return Problem(x, None if one_set else y, labels=columns, **given)


class Evaluated:
    """An engine's statistics of a problem, with the leaves to differentiate them by."""

    def __init__(
        self, problem: Problem, engine: str, device: torch.device,
        dtype: torch.dtype = torch.float32, call: Callable[..., LineStatistics] = fastclip.contrast,
        wanted: set[str] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """wanted: the gradients to compute; None: all."""
        p, scalar = problem, torch.float64 if dtype == torch.float64 else torch.float32

        def leaf(value: Any, dtype: torch.dtype) -> Tensor:
            return torch.tensor(value, dtype=dtype, device=device)

        self.leaves = {
            "dx": leaf(p.x, dtype), "dy": None if p.y is None else leaf(p.y, dtype),
            "dscale": leaf(p.scale, scalar), "dbias": leaf(p.bias, scalar),
            "dkey_bias": None if p.key_bias is None else leaf(p.key_bias, scalar),
        }  # fmt: skip
        x, y, scale, bias, key_bias = self.leaves.values()
        self.leaves = {name: t for name, t in self.leaves.items() if t is not None}
        for name, t in self.leaves.items():
            t.requires_grad_(wanted is None or name in wanted)
        ids = None
        if p.ids is not None:
            ids = tuple(torch.tensor(side, device=device) for side in p.ids)
        labels = None if p.labels is None else torch.tensor(p.labels, device=device)
        self.statistics = call(
            x, y, scale, bias, offset=p.offset, labels=labels,
            ids=ids[0] if ids and p.y is None else ids, same_id=p.same_id,
            false_negative_margin=p.margin, key_bias=key_bias, kind=p.kind, means=p.means,
            normalize=p.normalize, backend=engine, **options,
        )  # fmt: skip

    def gradients(self, loss: Tensor) -> dict[str, NDArray]:
        found = torch.autograd.grad(loss, tuple(self.leaves.values()))
        for leaf, gradient in zip(self.leaves.values(), found, strict=True):
            assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        return {
            name: gradient.double().cpu().numpy()
            for name, gradient in zip(self.leaves, found, strict=True)
        }


def check_statistics(
    problem: Problem, found: LineStatistics, dtype: torch.dtype, exact: Exact | None = None
) -> None:
    exact = exact or Exact(problem)
    allowed, every = allowance(exact, dtype), exact.statistics()
    assert {name for name in NAMES if getattr(found, name) is not None} == set(every)
    for name, truth in every.items():
        value = getattr(found, name)
        assert value.dtype == torch.float64 and value.shape == truth.shape
        value = value.detach().cpu().numpy()
        assert (np.isfinite(value) == np.isfinite(truth)).all(), name
        assert np.array_equal(
            value[~np.isfinite(truth)], truth[~np.isfinite(truth)], equal_nan=True
        )
        some = np.isfinite(truth)
        relative = KINDS[problem.kind].is_relative and name in SUMS
        size = np.abs(truth) if relative else 1.0
        size = np.broadcast_to(np.maximum(size, 1e-30), truth.shape)[some]
        error = np.abs(value[some] - truth[some]) / size
        assert (error <= allowed * 4).all(), f"{name}: off by {error.max():.2e}, {allowed * 4:.2e}"


def check_gradients(
    problem: Problem, found: dict[str, NDArray], upstream: dict[str, NDArray], dtype: torch.dtype,
    exact: Exact | None = None,
) -> None:  # fmt: skip
    exact = exact or Exact(problem)
    truth = exact.gradients(upstream)
    narrow = 2 * roundoff(dtype) if dtype == torch.bfloat16 else 0.0
    for name, value in found.items():
        right = getattr(truth, name)
        error = np.linalg.norm(value - right) / (np.linalg.norm(right) or 1.0)
        products = narrow if name in ("dx", "dy") else 0.0
        # In float64 the truth has as many roundings as the result.
        sides = 2 if dtype == torch.float64 else 1
        allowed = truth.conditions[name] * (sides * allowance(exact, dtype) + products)
        allowed += 2 * roundoff(dtype) if name in ("dx", "dy") else 1e-7
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


def allowance(exact: Exact, dtype: torch.dtype) -> float:
    """Returns the error of one careful exponential."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    d = exact.problem.x.shape[1]
    return (8 + d**0.5) * roundoff(wide) * (1 + exact.largest_logit)


def random_upstream(found: LineStatistics, seed: int = 3) -> dict[str, Tensor]:
    """Returns upstream gradients of either sign, over many orders of magnitude; 0 for a statistic
    without a finite value."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(like: Tensor) -> Tensor:
        signed, sizes = torch.randn(2, *like.shape, generator=generator, dtype=torch.float64)
        return (signed * 10 ** (0.8 * sizes)).to(like.device)

    return {
        name: torch.where(value.isfinite(), numbers(value), 0)
        for name in NAMES
        if (value := getattr(found, name)) is not None
    }
