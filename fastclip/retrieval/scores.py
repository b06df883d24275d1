"""Exact scores of chosen pairs, and the error of the products that stand for them.

A score is a sum in float64 of products of features. Those of float32 and half features are exact in
float64. Every sum goes in one order, that of `csrc/cpu/retrieval/exact.h`, so that equal features
have equal scores. Apple GPUs have no float64; their sums are in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine import arithmetic
from ..engine.dtypes import accumulation_dtype, state_dtype
from . import operators
from .sides import Sides

PAIRS = 1 << 21  # elements of a chunk of gathered features
SUMS = 16  # at a time


def pair_scores(sides: Sides, i: Tensor, j: Tensor) -> Tensor:
    """Returns the exact scores (P) of pairs (i, j), both (P) int64."""
    if sides.compiled:
        return operators.pair_scores(sides.x, sides.y, i, j)
    dtype = state_dtype(sides.device)
    rows = max(1, PAIRS // sides.x.shape[1])
    parts = [
        _sum(sides.x[a].to(dtype) * sides.y[b].to(dtype))
        for a, b in zip(i.split(rows), j.split(rows), strict=True)
    ]
    return torch.cat(parts) if parts else sides.x.new_empty((0,), dtype=dtype)


def _sum(terms: Tensor) -> Tensor:
    """Sums (P, D) over D. The order of `torch.sum` depends on the shape."""
    first, *others = F.pad(terms, (0, -terms.shape[1] % SUMS)).split(SUMS, dim=1)
    sums = first.clone()
    for part in others:
        sums += part
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def own_scores(sides: Sides, own: Tensor) -> Tensor:
    """Returns the exact score (M) of each query with its key own (M); infinite where own is -1."""
    lines = (own >= 0).nonzero()[:, 0]
    scores = torch.full(own.shape, torch.inf, dtype=state_dtype(sides.device), device=own.device)
    return scores.index_copy(0, lines, pair_scores(sides, lines, own[lines]))


def operand_rounding(device: torch.device) -> float:
    """Returns the relative error of the terms of float32 products, if the user lets the library
    round their operands."""
    if device.type == "cuda":
        return 2.0**-9 if arithmetic.tf32() else 0.0
    if device.type == "cpu":
        precision = torch.backends.mkldnn.matmul.fp32_precision
        return {"bf16": 2.0**-7, "tf32": 2.0**-9}.get(precision, 0.0)
    return 0.0


def product_error(sides: Sides) -> float:
    """Returns a bound of the error of plain PyTorch's products, relative to the features' norms."""
    dtype, width = accumulation_dtype(sides.x), sides.x.shape[1]
    # Tensor cores cut the digits that they cannot hold, and do not round.
    unit = torch.finfo(dtype).eps / (1 if sides.device.type == "cuda" else 2)
    # On CPUs half features are multiplied in float32, too.
    in_float32 = sides.x.dtype == torch.float32 or sides.device.type == "cpu"
    rounding = operand_rounding(sides.device) if in_float32 else 0.0
    return 1.01 * (unit * (width + 4) + rounding)


def norms(features: Tensor) -> Tensor:
    """Returns the norms (L) of features, in the dtype of states; only chunks are converted."""
    dtype, rows = state_dtype(features.device), max(1, PAIRS // 8 // features.shape[1])
    parts = [torch.linalg.vector_norm(p, dim=1, dtype=dtype) for p in features.split(rows)]
    return torch.cat(parts)


def bands(sides: Sides, error: float) -> tuple[Tensor, Tensor]:
    """Returns the largest error of the products of each query (M) and of each key (N), infinite
    where a partial sum may overflow. Denormal operands and terms may be flushed to zero."""
    dtype = accumulation_dtype(sides.x)
    info, root = torch.finfo(dtype), sides.x.shape[1] ** 0.5
    of_sides, found = [norms(sides.x), norms(sides.y)], []
    for own, others in (of_sides, of_sides[::-1]):
        other = others.max()
        band = own * other * error + info.tiny * root * (own + other + 2 * root)
        overflows = own * other * (1 + error) > info.max / 4
        found.append(torch.where(overflows, torch.inf, band * (1 + info.eps)).to(dtype))
    return found[0], found[1]
