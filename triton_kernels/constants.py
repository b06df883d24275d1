"""Numbers that kernels and their host code share."""

import os

import triton.language as tl

# True if kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
