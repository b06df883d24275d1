"""An fp32 product computed on bfloat16 tensor cores.

Each operand is split into three parts (`bf16_parts.py`), high + middle + low, each the rounded rest
of the ones before it: together they hold 24 bits, all that an fp32 number has. Six of the nine
products of parts matter; the other three lie below 2^-24 of the result.

Tensor cores truncate: each step of 16 along K cuts the sum off towards zero, so the error grows
with the number of steps. Two measures keep it below that of an fp32 product. The small products of
a step along K come first, when there is little to cut off. And tensor cores sum a single step only:
ordinary cores, which round, add it to the total. For K = 768 the model in
tests/support/tensor_core.py is off by 1e-7 this way, by 4e-6 if tensor cores sum everything; a
product in fp32 is off by 4e-7.
"""

import triton
import triton.language as tl

from ..configurations import NARROW
from ..constants import INTERPRETED

# Operands are padded to a multiple of this many features, or to NARROW: every step along them is
# whole.
DEPTH_UNIT = 64


def padded(d: int) -> int:
    """Returns the number of features in each part of an operand, padding included."""
    return NARROW if d <= NARROW else -(-d // DEPTH_UNIT) * DEPTH_UNIT


@triton.jit
def add_product(t, high_a, middle_a, low_a, high_b, middle_b, low_b):
    """Returns t + a @ b."""
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
    # The step has its own accumulator: `tl.dot(high_a, high_b, t)` would sum all steps on tensor
    # cores.
    return t + step
