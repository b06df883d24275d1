"""The host's side of the second sweep: chunks of weights, two products of each, what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import card, complete, finalise, plan, split_gradients
from . import weights as weight_kernels
from .block import Block
from .card import COLUMNS, LANES, ROWS
from .configurations import Config
from .kept import Kept
from .plan import Chunk, cdiv
from .states import add_sums

# Rows and columns of a program that turns kept weights into weights.
KEPT_TILE = {"BM": 16, "BN": 256}


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


class Lines:
    """What the second sweep takes of each line, rows first: the references, the coefficients a and
    b (None where they add up to 1), and two flags that the device sets: whether one reference
    serves, and whether what was kept does."""

    def __init__(
        self, block: Block, state: Tensor, coefficients: Tensor | None, kept: Kept
    ) -> None:
        self.rows = block.m
        self.references = state[0].contiguous() if block.epilogue.needs_state else None
        self.coefficients = self.exact = coefficients
        self.one = self.valid = None
        if coefficients is None or (block.is_small and kept.rows == 0):
            return
        lines = block.m + block.n
        self.coefficients = block.empty(lines)
        flags = block.empty(2, dtype=torch.int32)
        card.launch(
            finalise.lines_kernel, cdiv(lines, LANES) + 1, self.references, coefficients,
            kept.reference, flags, self.coefficients, lines, LANES=LANES,
        )  # fmt: skip
        if self.references is not None:
            self.one = flags[:1]
        if kept.rows:
            self.valid = flags[1:]

    def _of(self, values: Tensor | None, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
        if values is None:
            return None, None
        first, last = self.rows + chunk.column_start, self.rows + chunk.column_stop
        return values[chunk.row_slice], values[first:last]

    def references_of(self, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
        return self._of(self.references, chunk)

    def coefficients_of(self, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
        return self._of(self.coefficients, chunk)


class Weighing:
    """The second sweep of a block, or both in one go (`also_fold`)."""

    def __init__(
        self, block: Block, state: Tensor, positive: Tensor, coefficients: Tensor | None,
        needs: tuple[bool, bool], kept: Kept, also_fold: bool = False,
    ) -> None:  # fmt: skip
        self.block, self.state, self.positive = block, state, positive
        self.needs_x, self.needs_y = needs
        self.kept, self.fold = kept, also_fold
        if coefficients is not None:
            coefficients = coefficients.to(torch.float64).contiguous()
        self.lines = Lines(block, state, coefficients, kept)
        dtype = block.x.dtype
        self.dtype = torch.bfloat16 if block.split else dtype
        # Of weights, which are at most 2: the largest possible becomes 2^14.
        self.enlarged = 2.0**13 if dtype == torch.float16 else 1.0
        self.spread = dtype != torch.float16
        x_operand, y_operand = block.x, block.y
        if not self.spread:
            x_operand = self._unit(block.x, block.factor_x) if self.needs_y else x_operand
            y_operand = self._unit(block.y, block.factor_y) if self.needs_x else y_operand
        if block.split:
            x_operand, y_operand = block.operands
        self.x_operand, self.y_operand = x_operand, y_operand
        self.parts = 3 if block.split else 1
        self._config_apart = block.config("small" if block.is_small else "tile")

    @staticmethod
    def _unit(x: Tensor, factor: Tensor | None) -> Tensor:
        # Into half precision at once: no copy in fp32.
        return x if factor is None else torch.mul(x, factor[:, None], out=torch.empty_like(x))

    @property
    def constants(self) -> dict[str, Any]:
        return {"SPREAD": self.spread, "ENLARGED": self.enlarged}

    def weigh(
        self, config: Config, chunk: Chunk, weights: Tensor | None, totals: Tensor,
        partial: Tensor | None,
    ) -> None:  # fmt: skip
        """The weights of a chunk. Where lines may have references of their own, every way to make
        them is launched, and the device's flags say which one works."""
        by_state = self.block.epilogue.needs_state
        if chunk.kept:
            self._read(chunk, weights)
        elif not (by_state and self.block.is_small):
            self._one_reference(config, chunk, weights, totals, partial)
        if by_state:
            self._apart(chunk, weights, totals, self.lines.valid if chunk.kept else self.lines.one)

    def _one_reference(
        self, config: Config, chunk: Chunk, weights: Tensor | None, totals: Tensor,
        partial: Tensor | None,
    ) -> None:  # fmt: skip
        block, lines = self.block, self.lines
        skipped = block.skipped(chunk)
        plain = chunk.plain(skipped)
        where = (*block.strides, self._stride(weights), block.offset_of(chunk), skipped)
        coefficients = lines.coefficients_of(chunk)
        given = (*block.affine(chunk), lines.references, lines.one, *coefficients)
        kinds = {"FOLD": block.epilogue.fold, "ACTIVATION": block.epilogue.activation}
        if plain:
            card.launch(
                weight_kernels.weigh_kernel, block.programs(plain, config),
                *block.features(chunk, config), *given, card.stored(weights, config), totals,
                partial, chunk.rows, chunk.columns, *where, **kinds, **self.constants,
                **block.plain_tiles(config),
            )  # fmt: skip
        if chunk.tiles > plain:
            card.launch(
                weight_kernels.weigh_edges_kernel, chunk.tiles - plain, *block.features(chunk),
                *given, weights, totals, self.positive[chunk.row_slice] if self.fold else None,
                partial, chunk.rows, chunk.columns, block.width, *where, **kinds, **self.constants,
                SLICES=card.EDGE_SLICES, **block.tiles(config),
            )  # fmt: skip

    def _apart(
        self, chunk: Chunk, weights: Tensor | None, totals: Tensor, unless: Tensor | None
    ) -> None:
        block, config, chunk = self.block, self._config_apart, self._cut_apart(chunk)
        programs = chunk.tiles if unless is None else min(chunk.tiles, plan.SELDOM_PROGRAMS)
        card.launch(
            weight_kernels.weigh_apart_kernel, programs, *block.features(chunk),
            *block.affine(chunk), *self.lines.references_of(chunk), unless,
            *self.lines.coefficients_of(chunk), weights, totals, chunk.rows, chunk.columns,
            block.width, *block.strides, self._stride(weights),
            block.offset_of(chunk), ACTIVATION=block.epilogue.activation, GROUP=config.group,
            **self.constants, **block.tiles(config),
        )  # fmt: skip

    def _read(self, chunk: Chunk, weights: Tensor | None) -> None:
        if weights is None:
            return
        block, kept = self.block, self.kept.weights[chunk.row_slice, chunk.column_slice]
        factors = block.affine(chunk)[:2]
        programs = cdiv(chunk.rows, KEPT_TILE["BM"]) * cdiv(chunk.columns, KEPT_TILE["BN"])
        card.launch(
            weight_kernels.weigh_kept_kernel, programs, kept, *factors, self.lines.valid,
            *self.lines.coefficients_of(chunk), weights, chunk.rows, chunk.columns, kept.stride(0),
            self._stride(weights), PRECISION=block.precision, **self.constants, **KEPT_TILE,
        )  # fmt: skip

    def _stride(self, weights: Tensor | None) -> int:
        """From a row of weights to the next, or from a part of it to the next."""
        return 0 if weights is None else weights.stride(0) // self.parts

    def _cut_apart(self, chunk: Chunk) -> Chunk:
        config = self._config_apart
        return chunk._replace(bm=config.bm, bn=config.bn)

    def totals_of(self, chunk: Chunk) -> tuple[Tensor | None, int, int]:
        """A flag, and how many tiles write a chunk's totals: where it is set, and where it is
        not."""
        apart = self._cut_apart(chunk).tiles
        if not self.block.epilogue.needs_state:
            return None, 0 if chunk.kept else chunk.tiles, 0
        if chunk.kept:  # its moments were kept, too
            return self.lines.valid, 0, apart
        return (None, apart, 0) if self.block.is_small else (self.lines.one, chunk.tiles, apart)

    def prepare(self, config: Config) -> tuple[list[Chunk], tuple[Tensor | None, ...]]:
        """Chunks, and room for the weights, totals and partial sums of any of them."""
        block = self.block
        itemsize = plan.SPLIT_BYTES if block.split else self.dtype.itemsize
        chunks = list(plan.weigh(block.m, block.n, config, itemsize, self.kept.rows))
        totals = block.empty(2 * max(max(self.totals_of(chunk)[1:]) for chunk in chunks))
        partial = block.empty(max(c.partials for c in chunks)) if self.fold else None
        weights = None
        if self.needs_x or self.needs_y:
            stride = cdiv(max(c.columns for c in chunks), plan.COLUMN_UNIT) * plan.COLUMN_UNIT
            shape = (max(c.rows for c in chunks), self.parts * stride)
            weights = block.empty(*shape, dtype=self.dtype)
        return chunks, (weights, totals, partial)

    def run(
        self, kind: str, dx: Tensor, product_y: Tensor,
        finish_rows: Callable[[Tensor, Chunk], None] | None = None,
    ) -> Last:  # fmt: skip
        """All chunks. Products with y go to dx, or where that is narrower than fp32 to a room for
        those of one chunk: `finish_rows` makes gradients of them, but for the last rows'."""
        block = self.block

        def first(config: Config) -> None:
            chunks, buffers = self.prepare(config)
            made = (chunk for chunk in chunks if not chunk.kept)
            self.weigh(config, next(made, chunks[0]), *buffers)

        how = ", in one go" if self.fold else ""
        config = block.config(f"{kind}, {block.loss}{how}", first)
        chunks, (weights, sums, partial) = self.prepare(config)
        totals = block.empty(2, dtype=torch.float64) if len(chunks) > 1 else None
        room = None
        if self.needs_x and dx.dtype != torch.float32:
            room = block.empty(max(c.rows for c in chunks), block.d)
        for index, chunk in enumerate(chunks):
            self.weigh(config, chunk, weights, sums, partial)
            if self.fold:
                add_sums(block, chunk, partial, self.state, self.positive, None, None)
            made, is_last = self.totals_of(chunk), index + 1 == len(chunks)
            if not is_last:  # the last chunk's are added in the last launch
                card.launch(
                    finalise.totals_kernel, 2, sums, totals, *made, int(index == 0), LANES=LANES
                )
            product = None
            if self.needs_x:
                product = dx[chunk.row_slice] if room is None else room[: chunk.rows]
                self._add_rows(weights, chunk, product)
            if self.needs_y:
                self._add_columns(weights, chunk, product_y[chunk.column_slice])
            if not is_last and product is not None and chunk.column_stop == block.n and finish_rows:
                finish_rows(product, chunk)
        return Last(chunk, product, (sums, made[0], totals), made[1:])

    def _add_rows(self, weights: Tensor, chunk: Chunk, out: Tensor) -> None:
        y, begins = self.y_operand[chunk.column_slice], chunk.column_start == 0
        if self.block.split:
            self._add_split(weights, y, out, begins, transposed=False)
        else:
            accumulate(weights[: chunk.rows, : chunk.columns], y, out, begins)

    def _add_columns(self, weights: Tensor, chunk: Chunk, out: Tensor) -> None:
        x, begins = self.x_operand[chunk.row_slice], chunk.start == 0
        if self.block.split:
            self._add_split(weights, x, out, begins, transposed=True)
        else:
            accumulate(weights[: chunk.rows, : chunk.columns].T, x, out, begins)

    def _add_split(
        self, weights: Tensor, features: Tensor, out: Tensor, begins: bool, transposed: bool
    ) -> None:
        """out = or += weights, or their transpose, times features, all in parts."""

        def run(config: Config) -> None:
            programs = cdiv(len(out), config.bm) * cdiv(out.shape[1], config.bn)
            card.launch(
                split_gradients.split_gradient_kernel, programs, weights, features, out, len(out),
                len(features), self._stride(weights), out.stride(0), D=self.block.d,
                WIDTH=self.block.depth, TRANSPOSED=transposed, BEGINS=begins, BM=config.bm,
                BN=config.bn, BK=config.bk, GROUP=config.group, num_warps=config.warps,
                num_stages=config.stages,
            )  # fmt: skip

        run(self.block.config("small" if self.block.is_small else "gradient"))


class Last(NamedTuple):
    """What the last chunk leaves for the last launch."""

    chunk: Chunk
    product_x: Tensor | None
    totals: tuple[Tensor, Tensor | None, Tensor | None]  # its own, a flag, the earlier chunks'
    tiles: tuple[int, int]  # that wrote its own, where the flag is set and where it is not


class Tail:
    """What follows the products: positives, factors, gain, scale."""

    def __init__(
        self, sweep: Weighing, positive_weight: Tensor, gain: Tensor, project: bool, dx: Tensor,
        dy: Tensor,
    ) -> None:  # fmt: skip
        self.sweep, self.block, self.gain, self.project = sweep, sweep.block, gain, project
        self.weight = positive_weight.to(torch.float64).contiguous()
        self.dx, self.dy = dx, dy

    def finish_rows(self, product: Tensor, chunk: Chunk) -> None:
        self._complete((product, self.dx[chunk.row_slice], chunk.start))

    def finish(self, last: Last, product_y: Tensor, every_row: bool = False) -> Tensor:
        """The last chunk's rows, or all of them, the columns, and the totals, which it returns."""
        rows = None
        if self.sweep.needs_x:
            chunk = last.chunk
            rows = (last.product_x, self.dx[chunk.row_slice], chunk.start)
            if every_row:
                rows = (self.dx, self.dx, 0)
        columns = (product_y, self.dy) if self.sweep.needs_y else None
        totals = self.block.empty(2, dtype=torch.float64)
        self._complete(rows, columns, last, totals)
        return totals

    def _complete(
        self, rows: tuple[Tensor, Tensor, int] | None, columns: tuple[Tensor, Tensor] | None = None,
        last: Last | None = None, totals: Tensor | None = None,
    ) -> None:  # fmt: skip
        b, sweep = self.block, self.sweep
        product_x, out_x, first = rows or (None, None, 0)
        product_y, out_y = columns or (None, None)
        sums, tiles = (last.totals, last.tiles) if last else ((None, None, None), (0, 0))
        kept, lines = sweep.kept, sweep.lines
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
        card.launch(
            complete.complete_kernel, programs, product_x, product_y, b.x, b.y, *factors,
            self.weight, self.gain, b.scale, *outs, *sums, lines.valid, kept.moments, lines.exact,
            sweep.positive, totals, b.m, b.n, b.d, count, first, b.offset, *tiles, kept.rows,
            *strides, SPREAD=sweep.spread, PROJECT_X=projects[0], PROJECT_Y=projects[1],
            CLAMPED_IS_ZERO_X=zeroes[0], CLAMPED_IS_ZERO_Y=zeroes[1], ENLARGED=sweep.enlarged,
            ROWS=ROWS, BK=COLUMNS, LANES=LANES, num_warps=8,
        )  # fmt: skip
