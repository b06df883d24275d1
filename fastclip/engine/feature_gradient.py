"""The gradient of features that are normalised, in chunks of D."""

from __future__ import annotations

import torch
from torch import Tensor

from .block import Side
from .tiny_norms import CLAMPED


class FeatureGradient:
    """The gradient of one side's features, to which chunks of columns are added. The second loop
    over the chunks applies the normalisation's Jacobian, `factor * (g - x^ <x^, g>)`."""

    def __init__(self, side: Side, out: Tensor, dtype: torch.dtype) -> None:
        self.out = out
        self.along = out.new_zeros((out.shape[0], 1), dtype=dtype)
        self.factor = None if side.factor is None else side.factor.to(dtype)[:, None]
        if self.factor is not None:
            self.clamped = self.factor >= CLAMPED
            if side.features.dtype == torch.float16:
                # 1e12 times anything overflows fp16, which gets 0 for a zero row.
                self.factor = self.factor.masked_fill(self.clamped, 0)

    def add(self, gradient: Tensor, unit: Tensor, place: slice) -> None:
        if self.factor is not None:
            self.along = self.along + (gradient * unit).sum(1, keepdim=True)
            gradient = gradient * self.factor
        self.out[:, place] += gradient.to(self.out.dtype)

    def project(self, unit: Tensor, place: slice) -> None:
        part = torch.where(self.clamped, 0, unit * self.along * self.factor)
        self.out[:, place] -= part.to(self.out.dtype)
