"""An fp32 product on tensor cores of bfloat16.

Each operand comes in three parts (`parts.py`), high + middle + low, each the rounded rest of the
ones before it: 24 bits, all that an fp32 number has. Six of the nine products of parts matter; the
other three lie below 2^-24 of the result.

Tensor cores add up by truncation: every step of 16 along K cuts the sum off, always towards zero,
and the error grows with the number of steps. Two things keep it below that of an fp32 product: the
small products of a step along K come first, when there is little to be cut off, and only a step
long is what tensor cores add up: ordinary cores, which round, add it to the rest. For K = 768 the
model of tests/support/tensor_core.py is off by 1e-7 this way, by 4e-6 if they add up everything,
and a product in fp32 by 4e-7.
"""

import triton
import triton.language as tl

from ..configurations import NARROW
from ..epilogues import INTERPRETED

# Features of an operand come in multiples of this, or there are no more than NARROW: every step
# along them is whole.
DEPTH_UNIT = 64


def padded(d: int) -> int:
    """Features of a part of an operand."""
    return NARROW if d <= NARROW else -(-d // DEPTH_UNIT) * DEPTH_UNIT


@triton.jit
def add_product(t, high_a, middle_a, low_a, high_b, middle_b, low_b):
    """t + a @ b."""
    # The interpreter would multiply the bit patterns of bf16.
    if INTERPRETED:
        high_a, middle_a, low_a = (
            high_a.to(tl.float32), middle_a.to(tl.float32), low_a.to(tl.float32)
        )  # fmt: skip
        high_b, middle_b, low_b = (
            high_b.to(tl.float32), middle_b.to(tl.float32), low_b.to(tl.float32)
        )  # fmt: skip
    step = tl.dot(low_a, high_b)
    step = tl.dot(middle_a, middle_b, step)
    step = tl.dot(high_a, low_b, step)
    step = tl.dot(middle_a, high_b, step)
    step = tl.dot(high_a, middle_b, step)
    step = tl.dot(high_a, high_b, step)
    # A sum of their own: `tl.dot(high_a, high_b, t)` would leave everything to tensor cores.
    return t + step
