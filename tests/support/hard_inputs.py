"""Batches of features, by name, on which contrastive losses easily go wrong; NumPy, seeded.

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
    """Every image's largest logit belongs to a wrong text."""
    x, y = separated(rng, n, d)
    return x, np.roll(y, 1, axis=0)


def duplicates(rng: Generator, n: int, d: int) -> Batch:
    """A quarter of the batch repeats one pair, and another pair occurs twice."""
    x, y = random(rng, n, d)
    x[: n // 4], y[: n // 4] = x[0], y[0]
    x[-1], y[-1] = x[n // 2], y[n // 2]
    return x, y


def long_duplicates(rng: Generator, n: int, d: int) -> Batch:
    """Positives tie exactly with negatives, at logits so large that one ulp would decide the tie.

    All features have one length, so a pair's own logit is the largest. Half of the batch repeats
    the texts or the images of the other half, paired with images or texts that differ in two
    neighbouring entries.
    """
    x = rng.permuted(np.tile(np.linspace(30, 100, d) + rng.uniform(0, 0.1), (n, 1)), axis=1)
    y, half = x.copy(), n // 2
    for i in range(half):
        changed, order = (x, y)[i % 2], np.argsort(x[i])
        x[half + i] = y[half + i] = x[i]
        changed[half + i, order[[d // 2, d // 2 + 1]]] = x[i, order[[d // 2 + 1, d // 2]]]
    return x, y


def orthogonal(rng: Generator, n: int, d: int) -> Batch:
    """All cosines are zero: the softmax is uniform, and gradients nearly cancel."""
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    rows, half = np.arange(n), d // 2
    return basis[rows % half], basis[half + rows % (d - half)]


def cone(rng: Generator, n: int, d: int) -> Batch:
    """All features lie in a narrow cone, like those of freshly initialised towers."""
    return _unit(rng.normal(size=(n, d)) + 2), _unit(rng.normal(size=(n, d)) + 2)


def negative(rng: Generator, n: int, d: int) -> Batch:
    """All cosines are negative: a running maximum that starts from zero would be wrong."""
    x, y = cone(rng, n, d)
    return x, -y


def dominating(rng: Generator, n: int, d: int) -> Batch:
    """One logit is so much larger than all others that a bound shared by all rows is useless."""
    x, y = random(rng, n, d)
    x[0] *= 8
    y[min(1, n - 1)] = x[0]
    return x, y


def lengths(rng: Generator, n: int, d: int) -> Batch:
    """Features are not normalised; their norms spread over two orders of magnitude."""
    x, y = random(rng, n, d)
    spread = 10 ** rng.uniform(-1, 1, size=(2, n, 1))
    return x * spread[0], y * spread[1]


def zero_rows(rng: Generator, n: int, d: int) -> Batch:
    """Raw features of several lengths, some exactly zero, for `normalize=True`."""
    x, y = lengths(rng, n, d)
    x[[0, n // 2]], y[n - 1] = 0, 0
    return x, y


BATCHES: dict[str, Callable[[Generator, int, int], Batch]] = {
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


def batch(batch_name: str, n: int, d: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng([seed, zlib.crc32(batch_name.encode()), n, d])
    x, y = BATCHES[batch_name](rng, n, d)
    return x.astype(np.float32).astype(np.float64), y.astype(np.float32).astype(np.float64)
