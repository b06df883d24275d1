"""The order in which fused engines are tried for CUDA tensors: a table with its reasons.

The first row whose conditions all hold gives the order; the plain PyTorch engine comes last. The
figures are from `bench/results/nvidia-h100-80gb-hbm3.csv`.

FASTCLIP_GPU=cuda|triton|torch overrides the table, as `backend=` does. FASTCLIP_FP32=split|ieee
sets how float32 features are multiplied: "split" as six products of bfloat16 parts, "ieee" as they
are. Split products are as exact as IEEE ones and pay on cards whose bfloat16 is more than six times
faster than float32 (A100, H100, B200).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """An order of engines and its conditions. None matches anything; ranges exclude their end."""

    engines: tuple[str, ...]
    products: str | None = None  # the arithmetic: "half", "tf32", "split" or "ieee"
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None  # of the card
    logits: tuple[int, int] | None = None  # of the block, M x N
    d: tuple[int, int] | None = None  # features

    def takes(self, products: str, capability: tuple[int, int]) -> bool:
        return self.products in (None, products) and _within(capability, self.capability)

    def spans(self, logits: int, d: int) -> bool:
        return _within(logits, self.logits) and _within(d, self.d)


TABLE = (
    # IEEE fp32 has no tensor cores: Triton's product is a loop of its own on the ordinary ones, the
    # CUDA engine's is cuBLAS's. CLIP at N = 16384, D = 768: 79 ms and 35 ms.
    Row(("cuda", "triton"), products="ieee"),
    # Python launches a Triton kernel more slowly than C++ launches one of the CUDA engine, and up
    # to some 16384 x 16384 logits the card waits for launches: CLIP at N = 8192, D = 512 in bf16
    # takes 3.7 ms and 1.6 ms. A CUDA graph launches nothing from Python, and Triton's kernels are
    # faster there (N = 512: 0.052 ms and 0.081 ms): ask for `backend="triton"` in graphs.
    Row(("cuda", "triton"), products="half", logits=(0, 1 << 28)),
    # Half precision and tf32: Triton folds its tiles while they are in registers; the CUDA engine
    # writes them and reads them again. CLIP at N = 32768, D = 768 in bf16: 12 ms and 17 ms. Only
    # Triton has "split".
    Row(("triton", "cuda")),
)


# The default of FASTCLIP_FP32. "split" is faster for large batches only: CLIP takes 22 ms instead
# of 36 at N = 16384, D = 768; 6.3 instead of 6.4 at N = 8192 and 3.5 instead of 1.3 at N = 2048,
# both at D = 512.
FP32 = "ieee"


def order(rows: Iterable[Row], logits: int, d: int) -> tuple[str, ...]:
    for row in rows:
        if row.spans(logits, d):
            return row.engines
    return ()


def products_of(dtype: torch.dtype) -> str:
    """The arithmetic of products of features of this dtype, by the user's settings. float64, which
    no fused engine on GPUs takes, counts as "half"."""
    if dtype != torch.float32:
        return "half"
    if tf32():
        return "tf32"
    return "split" if fp32() == "split" and not torch.version.hip else "ieee"


def tf32() -> bool:
    """True if the user lets float32 products on GPUs round their operands to tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# This is torch.compiler.assume_constant_result without its import of the compiler: a compiled loss
# reads the setting once, when it is compiled.
tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def fp32() -> str:
    """Returns the value of FASTCLIP_FP32, or its default."""
    asked, known = os.environ.get("FASTCLIP_FP32") or FP32, ("split", "ieee")
    if asked not in known:
        raise ValueError(
            f"FASTCLIP_FP32 must be one of {', '.join(map(repr, known))}, got {asked!r}"
        )
    return asked


def _within(value: Any, span: tuple[Any, Any] | None) -> bool:
    # A comparison specialises a compiled loss to sizes, so it is made only if there is a range. A
    # loss that is being exported must serve all sizes: no range matches it.
    if span is None:
        return True
    return not torch.compiler.is_exporting() and span[0] <= value < span[1]
