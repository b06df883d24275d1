"""How features are multiplied on GPUs, by their dtype and the user's settings.

FASTCLIP_FP32=split|ieee sets it for float32: "split" as six products of bfloat16 parts, "ieee" as
they are. Split products are as exact as IEEE ones, and pay on cards whose bfloat16 is more than six
times faster than float32, such as an H100.
"""

from __future__ import annotations

import functools
import os

import torch

from .compile_marks import constant_in_graphs

# The default of FASTCLIP_FP32. "split" is faster for large batches only: CLIP takes 22 ms instead
# of 36 at N = 16384, D = 768; 6.3 instead of 6.4 at N = 8192 and 3.5 instead of 1.3 at N = 2048,
# both at D = 512.
FP32 = "ieee"


def arithmetic_of(dtype: torch.dtype) -> str:
    """The arithmetic of products of features of this dtype, by the user's settings. float64, which
    no fused engine on GPUs takes, counts as "half"."""
    if dtype != torch.float32:
        return "half"
    if tf32():
        return "tf32"
    return "split" if fp32() == "split" and not torch.version.hip else "ieee"


@constant_in_graphs
def tf32() -> bool:
    """True if the user lets float32 products on GPUs round their operands to tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def fp32() -> str:
    """Returns the value of FASTCLIP_FP32, or its default."""
    asked, known = os.environ.get("FASTCLIP_FP32") or FP32, ("split", "ieee")
    if asked not in known:
        raise ValueError(
            f"FASTCLIP_FP32 must be one of {', '.join(map(repr, known))}, got {asked!r}"
        )
    return asked
