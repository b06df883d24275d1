"""A block of logits in chunks of rows, in plain PyTorch: products and masks of pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..kinds import LOG2E, kind_of
from .block import Block
from .dtypes import accumulation_dtype, state_dtype

# Elements of a chunk: 8 MiB in fp32. Up to four such tensors exist at a time, six with targets.
CHUNK = 1 << 21


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a @ b of operands in their own dtype, accumulated and returned in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _chunks(m: int, n: int) -> Iterator[slice]:
    rows = max(1, CHUNK // n)
    return (slice(start, min(start + rows, m)) for start in range(0, m, rows))


class ChunkedBlock:
    """A block of logits that is made in chunks of rows."""

    def __init__(self, block: Block) -> None:
        self.block, self.kind = block, kind_of(block.kind)
        x, y = block.x.features, block.y.features
        self.dtype = accumulation_dtype(x)
        self.scale = block.scale.reshape(()).to(state_dtype(x.device)) * LOG2E
        # Added to the logits: one number, or one for each column.
        self.bias = block.key_bias
        if block.bias is not None and not self.kind.has_shift:
            bias = block.bias.reshape(()).to(self.scale.dtype)
            self.bias = bias if self.bias is None else self.bias.to(self.scale.dtype) + bias
        if self.bias is not None:
            self.bias = self.bias.to(self.scale.dtype) * LOG2E
        self.columns = torch.arange(y.shape[0], device=x.device)

    def chunks(self) -> Iterator[slice]:
        return _chunks(*self.block.sizes())

    def t(self, rows: slice) -> Tensor:
        """Products t (C, N) of a chunk of C rows."""
        x, y = self.block.x, self.block.y
        return self._products(rows, x.features, x.factor, y.features, y.factor)

    def targets(self, rows: slice) -> Tensor | None:
        """Products t' (C, N) of the targets, or None without them."""
        x, y = self.block.x, self.block.y
        if x.target is None:
            return None
        return self._products(rows, x.target, x.target_factor, y.target, y.target_factor)

    def _products(
        self, rows: slice, x: Tensor, factor_x: Tensor | None, y: Tensor, factor_y: Tensor | None
    ) -> Tensor:
        t = multiply(x[rows], y.T, self.dtype)
        if factor_x is not None:
            t *= factor_x[rows, None]
        if factor_y is not None:
            t *= factor_y
        return t

    def logits(self, t: Tensor) -> Tensor:
        """The logits of t, in log2 units."""
        logit = t * self.scale.to(self.dtype)
        return logit if self.bias is None else logit + self.bias.to(logit.dtype)

    def teacher_logits(self, targets: Tensor) -> Tensor:
        """The teacher's logits of t', in log2 units."""
        scale = self.block.target_scale.reshape(()).to(self.scale.dtype) * LOG2E
        return targets * scale.to(targets.dtype)

    def pairs(self, rows: slice, t: Tensor, targets: Tensor | None) -> PairMasks:
        x, y = self.block.x, self.block.y
        partners = torch.arange(rows.start, rows.stop, device=t.device) + self.block.offset
        negatives = partners[:, None] != self.columns
        positives = None
        if x.ids is not None:
            same = x.ids[rows, None] == y.ids
            positives = same & negatives if self.block.same_id_positive else None
            negatives = negatives & ~same
        if x.threshold is None:
            return PairMasks(negatives, negatives, positives)
        t = targets if self.block.guided else t
        # A pair whose t is NaN counts, so that the results of its line become NaN.
        return PairMasks(
            negatives & ~(t > x.threshold[rows, None]), negatives & ~(t > y.threshold), positives
        )


class PairMasks(NamedTuple):
    """Masks of the pairs of a chunk, (C, N)."""

    rows: Tensor  # negatives of their rows
    columns: Tensor  # negatives of their columns
    positives: Tensor | None  # positives by id
