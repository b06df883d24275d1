"""Batches of features on which contrastive losses go wrong, by name, seeded; float64 NumPy.

Values are representable in float32, so that a float32 tensor and the oracle hold the same numbers.
"""

import zlib
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Batch = tuple[NDArray, NDArray]  # x (N, D), y (N, D)


def _unit(x: NDArray) -> NDArray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def random(rng: Generator, n: int, d: int) -> Batch:
    return _unit(rng.normal(size=(n, d))), _unit(rng.normal(size=(n, d)))


def separated(rng: Generator, n: int, d: int) -> Batch:
    """Learnt pairs: softmax minus one cancels, and losses fall far below float32's resolution."""
    x = _unit(rng.normal(size=(n, d)))
    return x, _unit(x + 0.05 / np.sqrt(d) * rng.normal(size=(n, d)))


def peaked(rng: Generator, n: int, d: int) -> Batch:
    """Every image is sure of the wrong text."""
    x, y = separated(rng, n, d)
    return x, np.roll(y, 1, axis=0)


def duplicates(rng: Generator, n: int, d: int) -> Batch:
    """A quarter of the batch is one and the same pair, and another comes twice."""
    x, y = random(rng, n, d)
    x[: n // 4], y[: n // 4] = x[0], y[0]
    x[-1], y[-1] = x[n // 2], y[n // 2]
    return x, y


def long_duplicates(rng: Generator, n: int, d: int) -> Batch:
    """Exact ties of positives with negatives, at logits of which one unit in the last place would
    decide them. All features are of one length, so that a pair's own logit is the largest; half of
    the batch repeats the texts of the other half, or its images, beside images or texts that differ
    in two neighbouring entries."""
    x = rng.permuted(np.tile(np.linspace(30, 100, d) + rng.uniform(0, 0.1), (n, 1)), axis=1)
    y, half = x.copy(), n // 2
    for i in range(half):
        changed, order = (x, y)[i % 2], np.argsort(x[i])
        x[half + i] = y[half + i] = x[i]
        changed[half + i, order[[d // 2, d // 2 + 1]]] = x[i, order[[d // 2 + 1, d // 2]]]
    return x, y


def orthogonal(rng: Generator, n: int, d: int) -> Batch:
    """All cosines zero: uniform softmax, gradients that all but cancel."""
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    rows, half = np.arange(n), d // 2
    return basis[rows % half], basis[half + rows % (d - half)]


def cone(rng: Generator, n: int, d: int) -> Batch:
    """All features in one narrow cone, as those of freshly initialised towers are."""
    return _unit(rng.normal(size=(n, d)) + 2), _unit(rng.normal(size=(n, d)) + 2)


def negative(rng: Generator, n: int, d: int) -> Batch:
    """All cosines negative: a maximum that starts from zero would be wrong."""
    x, y = cone(rng, n, d)
    return x, -y


def dominating(rng: Generator, n: int, d: int) -> Batch:
    """One logit dwarfs every other, so that a bound or a maximum shared by all rows is useless."""
    x, y = random(rng, n, d)
    x[0] *= 8
    y[min(1, n - 1)] = x[0]
    return x, y


def lengths(rng: Generator, n: int, d: int) -> Batch:
    """Features nobody normalised, their norms spread over two orders of magnitude."""
    x, y = random(rng, n, d)
    spread = 10 ** rng.uniform(-1, 1, size=(2, n, 1))
    return x * spread[0], y * spread[1]


def zero_rows(rng: Generator, n: int, d: int) -> Batch:
    """Raw features of several lengths among which some are exactly zero. For `normalize=True`."""
    x, y = lengths(rng, n, d)
    x[[0, n // 2]], y[n - 1] = 0, 0
    return x, y


KINDS: dict[str, Callable[[Generator, int, int], Batch]] = {
    f.__name__: f
    for f in (
        random,
        separated,
        peaked,
        duplicates,
        long_duplicates,
        orthogonal,
        cone,
        negative,
        dominating,
        lengths,
        zero_rows,
    )
}


def batch(kind: str, n: int, d: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), n, d])
    x, y = KINDS[kind](rng, n, d)
    return x.astype(np.float32).astype(np.float64), y.astype(np.float32).astype(np.float64)
