"""The host's side of the end of a step: products of weights and features become gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .kernels import complete
from .launch import COLUMNS, LANES, ROWS
from .plan import Chunk, cdiv
from .second_sweep import LastChunk, Weighing


class Completion:
    """Adds the positives' terms to the products and applies factors, gain and scale."""

    def __init__(
        self, weighing: Weighing, positive_weight: Tensor, gain: Tensor, project: bool, dx: Tensor,
        dy: Tensor,
    ) -> None:  # fmt: skip
        self.weighing, self.block, self.gain, self.project = weighing, weighing.block, gain, project
        self.weight = positive_weight.to(torch.float64).contiguous()
        self.dx, self.dy = dx, dy

    def complete_rows(self, product: Tensor, chunk: Chunk) -> None:
        """Turns the products of a chunk's rows into gradients."""
        self._launch((product, self.dx[chunk.row_slice], chunk.start))

    def complete(self, last: LastChunk, product_y: Tensor, every_row: bool = False) -> Tensor:
        """Turns products into gradients, for the last chunk's rows (or every row) and for all
        columns; returns the totals."""
        rows = None
        if self.weighing.needs_x:
            chunk = last.chunk
            rows = (last.product_x, self.dx[chunk.row_slice], chunk.start)
            if every_row:
                rows = (self.dx, self.dx, 0)
        columns = (product_y, self.dy) if self.weighing.needs_y else None
        totals = self.block.empty(2, dtype=torch.float64)
        self._launch(rows, columns, last, totals)
        return totals

    def key_bias_gradient(self) -> Tensor:
        """Returns the gradient of the key bias; empty unless it is wanted."""
        b, found = self.block, self.weighing.by_column
        if found is None:
            return b.empty(0, dtype=torch.float64)
        first, last = max(0, -b.offset), min(b.m, b.n - b.offset)
        if first < last:
            found[first + b.offset : last + b.offset] += self.weight[first:last]
        return found.mul_(self.gain.reshape(()))

    def _launch(
        self, rows: tuple[Tensor, Tensor, int] | None, columns: tuple[Tensor, Tensor] | None = None,
        last: LastChunk | None = None, totals: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launches the kernel for rows (product, gradient, first row), columns (product, gradient)
        and totals, each only if it is given."""
        b, weighing = self.block, self.weighing
        product_x, out_x, first = rows or (None, None, 0)
        product_y, out_y = columns or (None, None)
        sums, tiles = (last.totals, last.tiles) if last else ((None, None, None), (0, 0))
        kept, lines = weighing.kept, weighing.lines
        outs, factors = (out_x, out_y), (b.factor_x, b.factor_y)
        projects = [self.project and factor is not None for factor in factors]
        zeroes = [
            self.project
            and torch.float16 in (b.x.dtype, *(o.dtype for o in (out,) if o is not None))
            for out in outs
        ]
        count = 0 if out_x is None else len(out_x)
        programs = (
            cdiv(count, ROWS) + (0 if out_y is None else cdiv(b.n, ROWS)) + (last is not None)
        )
        strides = [0 if t is None else t.stride(0) for t in (product_x, product_y)]
        strides += [b.x.stride(0), b.y.stride(0)]
        strides += [0 if t is None else t.stride(0) for t in outs]
        launch.launch(
            complete.complete_kernel, programs, product_x, product_y, b.x, b.y, *factors,
            self.weight, self.gain, b.scale, *outs, *sums, lines.kept_is_valid, kept.moments,
            lines.in_float64, weighing.positive, totals, b.m, b.n, b.d, count, first, b.offset,
            *tiles, kept.rows, *strides, SPREAD=weighing.spread, PROJECT_X=projects[0],
            PROJECT_Y=projects[1], CLAMPED_IS_ZERO_X=zeroes[0], CLAMPED_IS_ZERO_Y=zeroes[1],
            ENLARGED=weighing.enlarged, ROWS=ROWS, BK=COLUMNS, LANES=LANES, num_warps=8,
        )  # fmt: skip
