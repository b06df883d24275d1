"""Which fused engine is tried first on CUDA tensors: one table, and the reasons for its rows.

The first row whose conditions all hold says the order; the plain PyTorch engine comes after all of
them. Figures are those of `bench/results/nvidia-h100-80gb-hbm3.csv`.

FASTCLIP_GPU=cuda|triton|torch overrules the table, as `backend=` does. FASTCLIP_FP32=split|ieee
says how float32 features are multiplied: as six products of bfloat16 parts, as exact as IEEE ones
and meant for cards whose bfloat16 is more than six times faster (A100, H100, B200 and their like),
or as they are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """An order of engines and where it holds; None matches anything; ranges exclude their end."""

    engines: tuple[str, ...]
    products: str | None = None  # "half", "tf32", "split" or "fp32": what multiplies
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
    Row(("cuda", "triton"), products="fp32"),
    # A launch costs Python more for a Triton kernel than C++ for one of the other engine, and up to
    # some 16384 x 16384 logits the card waits for launches: CLIP at N = 8192, D = 512 in bf16 takes
    # 3.7 ms and 1.6 ms. In a CUDA graph nothing is launched from Python, and Triton's kernels are
    # faster (N = 512: 0.052 ms and 0.081 ms): there ask for `backend="triton"`.
    Row(("cuda", "triton"), products="half", logits=(0, 1 << 28)),
    # Half precision and tf32: Triton's tiles are folded while they are in registers, the CUDA
    # engine's are written and read once more. CLIP at N = 32768, D = 768 in bf16: 12 ms and 17 ms.
    # "split" is Triton's alone.
    Row(("triton", "cuda")),
)


# Without FASTCLIP_FP32. "split" is as exact, and faster in large batches alone: CLIP takes 22 ms
# instead of 36 at N = 16384, D = 768; both take 6.4 at N = 8192, and it 3.5 instead of 1.3 at 2048.
FP32 = "ieee"


def order(rows: Iterable[Row], logits: int, d: int) -> tuple[str, ...]:
    for row in rows:
        if row.spans(logits, d):
            return row.engines
    return ()


def products_of(dtype: torch.dtype) -> str:
    """The arithmetic that the user's settings give to the products of features of this dtype."""
    if dtype != torch.float32:
        return "half"
    if tf32():
        return "tf32"
    return "split" if fp32() == "split" and not torch.version.hip else "fp32"


def tf32() -> bool:
    """True where the user lets products of float32 on GPUs round their operands to tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# What torch.compiler.assume_constant_result does, without importing the compiler here: a compiled
# loss asks once, when it is compiled.
tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def fp32() -> str:
    """Returns what FASTCLIP_FP32 asks for."""
    asked, known = os.environ.get("FASTCLIP_FP32") or FP32, ("split", "ieee")
    if asked not in known:
        raise ValueError(
            f"FASTCLIP_FP32 must be one of {', '.join(map(repr, known))}, got {asked!r}"
        )
    return asked


def _within(value: Any, span: tuple[Any, Any] | None) -> bool:
    # Without a range nothing is compared: a compiled loss would else be compiled for sizes. An
    # exported one serves all of them.
    if span is None:
        return True
    return not torch.compiler.is_exporting() and span[0] <= value < span[1]
