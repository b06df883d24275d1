"""Library products of chunks of queries with all keys, for plain PyTorch on any device."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..engine.chunked_block import CHUNK, multiply
from ..engine.dtypes import accumulation_dtype
from .sides import Sides


def chunks_of(sides: Sides, parts: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of the queries, and their products (C, N): of CHUNK elements, divided by
    `parts`, or of one query."""
    dtype, rows = accumulation_dtype(sides.x), max(1, CHUNK // parts // len(sides.y))
    for start in range(0, len(sides.x), rows):
        part = slice(start, min(start + rows, len(sides.x)))
        yield part, multiply(sides.x[part], sides.y.T, dtype)
