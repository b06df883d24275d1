"""Flags that the device sets for itself: which of several launches is to work."""

import triton
import triton.language as tl


@triton.jit
def is_set(FLAG, if_absent: tl.constexpr):
    if FLAG is None:
        return if_absent
    else:
        return tl.load(FLAG) != 0
