"""The layout of what a first sweep keeps: weights without their coefficients, and their moments.

`fastclip.engine.kept` decides how long the tensor is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.kept import UNIT, Weights
from .plan import cdiv


class Kept(NamedTuple):
    """Views of the kept tensor of a block; all are absent if nothing was kept."""

    rows: int = 0
    moments: Tensor | None = None  # sums of w and of w * t for every line, (2, m + n)
    shift: Tensor | None = None  # the shift that w is relative to, (1)
    weights: Tensor | None = None  # w, (rows, n and padding)

    @staticmethod
    def of(kept: Tensor, m: int, n: int, x: Tensor) -> Kept:
        if kept.numel() == 0:
            return Kept()
        header = Weights.header(m, n)
        numbers = kept[:header].view(torch.float64)
        weights = kept[header:].view(Weights.dtype(x)).view(-1, cdiv(n, UNIT) * UNIT)
        moments = numbers[: 2 * (m + n)].view(2, m + n)
        return Kept(len(weights), moments, numbers[2 * (m + n) : 2 * (m + n) + 1], weights)
