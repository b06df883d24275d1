"""A model of tensor cores from measurements: products are exact, sums are truncated, not rounded.

A step adds the products of a few neighbours along K to the accumulator at once. Every addend is
aligned to the largest one and loses its bits more than a few places below float32's last; the sum
is truncated to float32. Errors therefore point towards zero and grow with the number of steps.

The model follows "FTTN", arXiv 2403.00232, and Ootomo and Yokota, arXiv 2203.03341.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Core(NamedTuple):
    step: int  # neighbours along K that are added at once
    bits: int  # bits of an addend that are kept below the leading bit of the largest


HOPPER = Core(16, 25)
AMPERE = Core(8, 24)


def truncated(x: NDArray) -> NDArray:
    """Converts float64 to float32, rounding towards zero."""
    x = np.asarray(x, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        near = x.astype(np.float32)
        return np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near)


def multiply(a: NDArray, b: NDArray, accumulator: NDArray | None = None, core: Core = HOPPER):
    """Returns accumulator + a @ b in float32 for a and b of half precision."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    total = np.zeros((len(a), b.shape[1])) if accumulator is None else accumulator
    for k in range(0, a.shape[1], core.step):
        ks = slice(k, k + core.step)
        terms = np.concatenate(
            [total[:, None, :].astype(np.float64), a[:, ks, None] * b[None, ks, :]], axis=1
        )
        largest = np.abs(terms).max(axis=1, keepdims=True)
        finite = np.isfinite(largest) & (largest > 0)
        _, exponent = np.frexp(np.where(finite, largest, 1.0))
        unit = np.ldexp(1.0, exponent - 1 - core.bits)
        with np.errstate(invalid="ignore"):
            total = truncated((np.trunc(terms / unit) * unit).sum(axis=1))
    return total.astype(np.float32)
