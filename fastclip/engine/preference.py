"""The order in which fused engines are tried for CUDA tensors: a table with its reasons.

The first row whose conditions all hold gives the order; the plain PyTorch engine comes last. The
figures are from `bench/results/nvidia-h100-80gb-hbm3.csv`.

FASTCLIP_GPU=cuda|triton|torch overrides the table, as `backend=` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """An order of engines and its conditions. None matches anything; ranges exclude their end."""

    engines: tuple[str, ...]
    arithmetic: str | None = None  # of the products: "half", "tf32", "split" or "ieee"
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None  # of the card
    logits: tuple[int, int] | None = None  # of the block, M x N
    d: tuple[int, int] | None = None  # the width of the features

    def takes(self, arithmetic: str, capability: tuple[int, int]) -> bool:
        return self.arithmetic in (None, arithmetic) and _within(capability, self.capability)

    def spans(self, logits: int, d: int) -> bool:
        return _within(logits, self.logits) and _within(d, self.d)


TABLE = (
    # Tensor cores do not multiply IEEE fp32. On the ordinary cores Triton compiles a loop for the
    # product, and the CUDA engine calls cuBLAS. CLIP at N = 16384, D = 768 takes 79 ms with Triton
    # and 35 ms with the CUDA engine.
    Row(("cuda", "triton"), arithmetic="ieee"),
    # Python launches a Triton kernel more slowly than C++ launches one of the CUDA engine, and up
    # to some 16384 x 16384 logits the card waits for launches: CLIP at N = 8192, D = 512 in bf16
    # takes 3.7 ms with Triton, 1.6 ms with the CUDA engine. A CUDA graph launches nothing from
    # Python, and Triton's kernels are faster in one (N = 512: 0.052 ms against 0.081 ms): ask for
    # `backend="triton"` in CUDA graphs.
    Row(("cuda", "triton"), arithmetic="half", logits=(0, 1 << 28)),
    # Half precision and tf32: Triton folds its tiles while they are in registers; the CUDA engine
    # writes them and reads them again. CLIP at N = 32768, D = 768 in bf16 takes 12 ms with Triton,
    # 17 ms with the CUDA engine. Only Triton has "split" products.
    Row(("triton", "cuda")),
)


def order(rows: Iterable[Row], logits: int, d: int) -> tuple[str, ...]:
    for row in rows:
        if row.spans(logits, d):
            return row.engines
    return ()


def _within(value: Any, span: tuple[Any, Any] | None) -> bool:
    # A comparison specialises a compiled loss to sizes, so it is made only if there is a range. A
    # loss that is being exported must serve all sizes: no range matches it.
    if span is None:
        return True
    return not torch.compiler.is_exporting() and span[0] <= value < span[1]
