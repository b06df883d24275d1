"""Which fused engine is tried first on CUDA tensors: one table, and the reasons for its rows.

The first row whose conditions all hold says the order; the plain PyTorch engine comes after all of
them. No row rests on a measurement yet. FASTCLIP_GPU=cuda|triton|torch overrules the table, as
`backend=` does. FASTCLIP_FP32=split|ieee says how float32 features are multiplied: as six products
of bfloat16 parts, as exact as IEEE ones and meant for cards whose bfloat16 is more than six times
faster (A100, H100, B200 and their like), or as they are.
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
    n: tuple[int, int] | None = None  # pairs
    d: tuple[int, int] | None = None  # features

    def takes(self, products: str, capability: tuple[int, int]) -> bool:
        return self.products in (None, products) and _within(capability, self.capability)

    def spans(self, n: int, d: int) -> bool:
        return _within(n, self.n) and _within(d, self.d)


TABLE = (
    # IEEE fp32 has no tensor cores: Triton's product is a loop of its own on the ordinary ones, the
    # CUDA engine's is cuBLAS's.
    Row(("cuda", "triton"), products="fp32"),
    # Half precision and tf32: Triton's tiles are folded while they are in registers, the CUDA
    # engine's are written and read once more. "split" is Triton's alone.
    Row(("triton", "cuda")),
)


# Without FASTCLIP_FP32. No card has shown yet how fast "split" is, nor its errors.
FP32 = "ieee"


def order(rows: Iterable[Row], n: int, d: int) -> tuple[str, ...]:
    for row in rows:
        if row.spans(n, d):
            return row.engines
    return ()


def products_of(dtype: torch.dtype) -> str:
    """The arithmetic that the user's settings give to the products of features of this dtype."""
    if dtype != torch.float32:
        return "half"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "split" if fp32() == "split" and not torch.version.hip else "fp32"


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
    # Without a range nothing is compared: a compiled loss would else be compiled for sizes.
    return span is None or span[0] <= value < span[1]
