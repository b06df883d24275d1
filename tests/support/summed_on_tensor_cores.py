"""A wrong `add_product` that sums everything on tensor cores, without the step that rounds."""

import triton
import triton.language as tl


@triton.jit
def add_product(t, high_a, middle_a, low_a, high_b, middle_b, low_b):
    high_a, high_b = high_a.to(tl.float32), high_b.to(tl.float32)
    middle_a, middle_b = middle_a.to(tl.float32), middle_b.to(tl.float32)
    low_a, low_b = low_a.to(tl.float32), low_b.to(tl.float32)
    t = tl.dot(low_a, high_b, t)
    t = tl.dot(middle_a, middle_b, t)
    t = tl.dot(high_a, low_b, t)
    t = tl.dot(middle_a, high_b, t)
    t = tl.dot(high_a, middle_b, t)
    return tl.dot(high_a, high_b, t)
