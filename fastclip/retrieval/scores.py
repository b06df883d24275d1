"""Exact scores of chosen pairs, and the error of the products that stand for them.

A score is a sum in float64 of products of features. Those of float32 and half features are exact in
float64. Equal features have equal scores, since every sum goes in one order. Apple GPUs have no
float64; their sums are in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import arithmetic
from ..engine.dtypes import state_dtype
from . import operators
from .sides import Sides

PAIRS = 1 << 21  # elements of a chunk of gathered features


def pair_scores(sides: Sides, i: Tensor, j: Tensor) -> Tensor:
    """Returns the exact scores (P) of pairs (i, j), both (P) int64."""
    if sides.compiled and not sides.is_empty:
        return operators.pair_scores(sides.x, sides.y, i, j)
    dtype = state_dtype(sides.device)
    rows = max(1, PAIRS // sides.x.shape[1])
    parts = [
        (sides.x[a].to(dtype) * sides.y[b].to(dtype)).sum(1)
        for a, b in zip(i.split(rows), j.split(rows), strict=True)
    ]
    return torch.cat(parts) if parts else sides.x.new_empty((0,), dtype=dtype)


def own_scores(sides: Sides, own: Tensor) -> Tensor:
    """Returns the exact score (M) of each query with its key own (M); infinite where own is -1."""
    lines = (own >= 0).nonzero()[:, 0]
    scores = torch.full(own.shape, torch.inf, dtype=state_dtype(sides.device), device=own.device)
    return scores.index_copy(0, lines, pair_scores(sides, lines, own[lines]))


def product_error(sides: Sides) -> float:
    """Returns a bound of the error of plain PyTorch's products, relative to the features' norms."""
    dtype, width = sides.x.dtype, sides.x.shape[1]
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    error = 1.01 * unit * (width + 4)
    if dtype == torch.float32:
        if sides.device.type == "cuda" and arithmetic.tf32():
            error += 2.0**-9
        if sides.device.type == "cpu" and torch.backends.mkldnn.matmul.fp32_precision == "bf16":
            error += 2.0**-7
    return error


def bands(sides: Sides, error: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the largest error of the products of each query (M) and of each key (N)."""
    wide = state_dtype(sides.device)
    norms = [torch.linalg.vector_norm(t, dim=1, dtype=wide) for t in (sides.x, sides.y)]
    tiny = torch.finfo(dtype).tiny
    return tuple(
        (own * other.max() * error).to(dtype) + tiny for own, other in (norms, norms[::-1])
    )
