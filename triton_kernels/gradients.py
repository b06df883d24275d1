"""The host's side of the second sweep: chunks of weights, two products of each, what follows."""

from __future__ import annotations

import torch
from torch import Tensor

from . import card, complete, finalise, plan
from . import weights as weight_kernels
from .block import Block
from .card import COLUMNS, LANES, ROWS
from .configurations import Config
from .plan import Chunk, cdiv
from .states import add_sums


def accumulate(a: Tensor, b: Tensor, out: Tensor, begins: bool) -> None:
    """out = a @ b, or out += a @ b: a library product that accumulates in fp32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out) if begins else torch.addmm(out, a, b, out=out)
    elif a.is_cuda and not torch.version.hip:
        if begins:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            _add_product(a, b, out)
    else:
        product = a.to(out.dtype) @ b.to(out.dtype)
        out.copy_(product) if begins else out.add_(product)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    try:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        # A torch whose addmm adds to half precision only.
        out += torch.mm(a, b, out_dtype=out.dtype)


class Weighing:
    """The second sweep of a block, or both in one go (`also_fold`)."""

    def __init__(
        self, block: Block, state: Tensor, positive: Tensor, coefficients: Tensor | None,
        needs: tuple[bool, bool], kept: Tensor | None = None, also_fold: bool = False,
    ) -> None:  # fmt: skip
        self.block, self.state, self.positive = block, state, positive
        # a, then b; None where they add up to 1.
        self.coefficients = coefficients
        if coefficients is not None:
            self.coefficients = coefficients.to(torch.float64).contiguous()
        self.needs_x, self.needs_y = needs
        self.kept, self.fold = kept, also_fold
        self.kept_rows = 0 if kept is None else kept.numel() // block.n
        dtype = block.x.dtype
        # Of weights, which are at most 2: the largest possible becomes 2^14.
        self.enlarged = 2.0**13 if dtype == torch.float16 else 1.0
        self.spread = dtype != torch.float16
        x_operand, y_operand = block.x, block.y
        if not self.spread:
            x_operand = self._unit(block.x, block.factor_x) if self.needs_y else x_operand
            y_operand = self._unit(block.y, block.factor_y) if self.needs_x else y_operand
        self.x_operand, self.y_operand = x_operand, y_operand
        # Decided here and not in each tile, where it costs the kernel 40 to 60 registers.
        self.one = None
        if block.epilogue.needs_state:
            self.one = (state[0] == state[0, 0]).all().view(torch.uint8)

    @staticmethod
    def _unit(x: Tensor, factor: Tensor | None) -> Tensor:
        # Into half precision at once: no copy in fp32.
        return x if factor is None else torch.mul(x, factor[:, None], out=torch.empty_like(x))

    def weigh(
        self, config: Config, chunk: Chunk, weights: Tensor | None, totals: Tensor,
        partial: Tensor | None,
    ) -> None:  # fmt: skip
        block, m = self.block, self.block.m
        x, *others = block.part(chunk)
        width, stride, stride_y = block.lengths
        if chunk.kept:
            x, stride = self.kept[chunk.start * block.n + chunk.column_start :], block.n
        rows = slice(chunk.start, chunk.stop)
        columns = slice(m + chunk.column_start, m + chunk.column_stop)
        references = (self.state[0, rows], self.state[0, columns])
        coefficients = (None, None)
        if self.coefficients is not None:
            coefficients = self.coefficients[rows], self.coefficients[columns]
        write = weights is not None
        card.launch(
            weight_kernels.weigh_kernel, chunk.programs, x, *others,
            *(references if self.one is not None else (None, None)), self.one,
            *coefficients, weights, totals,
            self.positive[rows] if self.fold else None, partial, chunk.rows, chunk.columns,
            width, stride, stride_y, weights.stride(0) if write else 0,
            block.offset_of(chunk), KEPT=chunk.kept, SPREAD=self.spread, ENLARGED=self.enlarged,
            FOLD=block.epilogue.fold, ACTIVATION=block.epilogue.activation, **block.tiles(config),
        )  # fmt: skip

    def _prepare(self, config: Config) -> tuple[list[Chunk], tuple[Tensor | None, ...]]:
        """Chunks, and room for the weights, totals and partial sums of any of them."""
        block, itemsize = self.block, self.block.x.element_size()
        chunks = list(plan.weigh(block.m, block.n, config, itemsize, self.kept_rows))
        sums = block.empty(2 * max(chunk.programs for chunk in chunks))
        partial = block.empty(max(c.partials for c in chunks)) if self.fold else None
        weights = None
        if self.needs_x or self.needs_y:
            stride = cdiv(max(c.columns for c in chunks), plan.COLUMN_UNIT) * plan.COLUMN_UNIT
            weights = block.empty(max(c.rows for c in chunks), stride, dtype=block.x.dtype)
        return chunks, (weights, sums, partial)

    def run(self, kernel: str, dx: Tensor, dy: Tensor, tail: Tail | None) -> Tensor:
        """Fills dy with products, dx with gradients; returns the negatives' totals."""
        block = self.block

        def first(config: Config) -> None:
            chunks, buffers = self._prepare(config)
            self.weigh(config, chunks[0], *buffers)

        config = block.config(kernel, first)
        chunks, (weights, sums, partial) = self._prepare(config)
        totals = block.empty(2, dtype=torch.float64)
        room = None
        if self.needs_x and dx.dtype != torch.float32:
            room = block.empty(max(c.rows for c in chunks), block.d)
        for index, chunk in enumerate(chunks):
            self.weigh(config, chunk, weights, sums, partial)
            fresh = int(index == 0)
            card.launch(finalise.totals_kernel, 2, sums, totals, chunk.programs, fresh, LANES=LANES)
            if self.fold:
                add_sums(block, chunk, partial, self.state, self.positive, None, None)
            if weights is None:
                continue
            w = weights[: chunk.rows, : chunk.columns]
            if self.needs_x:
                product = dx[chunk.row_slice] if room is None else room[: chunk.rows]
                begins = chunk.column_start == 0
                accumulate(w, self.y_operand[chunk.column_slice], product, begins)
                if tail is not None and chunk.column_stop == block.n:
                    tail.finish_rows(product, dx[chunk.row_slice], chunk.start)
            if self.needs_y:
                x = self.x_operand[chunk.row_slice]
                accumulate(w.T, x, dy[chunk.column_slice], chunk.start == 0)
        return totals


class Tail:
    """What follows the products: positives, factors, gain, scale."""

    def __init__(
        self, sweep: Weighing, positive_weight: Tensor, gain: Tensor, project: bool
    ) -> None:
        self.sweep, self.block, self.gain, self.project = sweep, sweep.block, gain, project
        self.weight = positive_weight.to(torch.float64).contiguous()

    def finish_rows(self, product: Tensor, out: Tensor, first: int) -> None:
        b = self.block
        self._complete(product, out, first, b.x, b.y, b.factor_x, b.factor_y, b.offset, False)

    def finish_columns(self, product: Tensor, out: Tensor) -> None:
        b = self.block
        self._complete(product, out, 0, b.y, b.x, b.factor_y, b.factor_x, -b.offset, True)

    def _complete(
        self, product: Tensor, out: Tensor, first: int, mine: Tensor, other: Tensor,
        factor: Tensor | None, other_factor: Tensor | None, offset: int, by_partner: bool,
    ) -> None:  # fmt: skip
        card.launch(
            complete.complete_kernel, cdiv(out.shape[0], ROWS), product, mine, other, factor,
            other_factor, self.weight, self.gain, self.block.scale, out, out.shape[0],
            other.shape[0], self.block.d, first, offset, product.stride(0), mine.stride(0),
            other.stride(0), out.stride(0), BY_PARTNER=by_partner,
            SPREAD=self.sweep.spread, PROJECT=self.project and factor is not None,
            CLAMPED_IS_ZERO=torch.float16 in (out.dtype, mine.dtype) and self.project,
            ENLARGED=self.sweep.enlarged, ROWS=ROWS, BK=COLUMNS,
        )  # fmt: skip

    def totals(self, totals: Tensor) -> Tensor:
        out = torch.empty_like(totals)
        card.launch(
            complete.complete_totals_kernel, 1, totals, self.weight, self.sweep.positive, self.gain,
            out, self.block.m, self.block.n, self.block.offset, LANES=LANES,
        )  # fmt: skip
        return out
