"""Flags that the device sets, so that only one of several launches does the work."""

import triton
import triton.language as tl


@triton.jit
def is_set(FLAG, if_absent: tl.constexpr):
    """True if the flag is set; `if_absent` if there is no flag."""
    if FLAG is None:
        return if_absent
    else:
        return tl.load(FLAG) != 0
