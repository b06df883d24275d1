"""The host's side of the second sweep: chunks of weights, and two products of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch, plan
from .configurations import Config
from .first_sweep import add_columns, add_sums
from .kept import Kept
from .kernels import finalise, split_gradients, weigh_kept
from .kernels import weigh as weight_kernels
from .launch import LANES
from .lines import Lines
from .logit_block import LogitBlock
from .plan import Chunk, cdiv

# The tile of a program that multiplies kept weights by their coefficients.
KEPT_TILE = {"BM": 16, "BN": 256}


def accumulate(a: Tensor, b: Tensor, out: Tensor, begins: bool) -> None:
    """Computes out = a @ b if it begins, else out += a @ b: a library product with fp32 sums."""
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
        # This torch has no addmm of half-precision operands that adds to fp32.
        out += torch.mm(a, b, out_dtype=out.dtype)


class Buffers(NamedTuple):
    """Room for the results of a chunk's tiles."""

    weights: Tensor | None
    totals: Tensor
    sums: Tensor | None  # the columns' sums of weights
    partial: Tensor | None


class LastChunk(NamedTuple):
    """The last chunk, its product with y, and its totals: the last launch completes them."""

    chunk: Chunk
    product_x: Tensor | None
    # The totals of this chunk's tiles; a flag; the totals of all earlier chunks.
    totals: tuple[Tensor, Tensor | None, Tensor | None]
    # The number of tiles that wrote totals: if the flag is set or absent, and if it is not set.
    tiles: tuple[int, int]


class Weighing:
    """The second sweep of a block, or both sweeps in one go (`also_fold`)."""

    def __init__(
        self, block: LogitBlock, state: Tensor, positive: Tensor, coefficients: Tensor | None,
        needs: tuple[bool, bool, bool], kept: Kept, also_fold: bool = False,
    ) -> None:  # fmt: skip
        self.block, self.state, self.positive = block, state, positive
        self.needs_x, self.needs_y, needs_columns = needs
        # The columns' sums of weights.
        self.by_column = block.empty(block.n, dtype=torch.float64) if needs_columns else None
        self.kept, self.fold = kept, also_fold
        if coefficients is not None:
            coefficients = coefficients.to(torch.float64).contiguous()
        self.lines = Lines(block, state, coefficients, kept)
        dtype = block.x.dtype
        self.dtype = torch.bfloat16 if block.split else dtype
        # Weights are at most 2: in fp16 the largest possible one becomes 2^14.
        self.enlarged = 2.0**13 if dtype == torch.float16 else 1.0
        # True if stored weights contain the features' factors (`kernels/weigh.py`).
        self.spread = dtype != torch.float16
        x_operand, y_operand = block.x, block.y
        if not self.spread:
            x_operand = self._normalized(block.x, block.factor_x) if self.needs_y else x_operand
            y_operand = self._normalized(block.y, block.factor_y) if self.needs_x else y_operand
        if block.split:
            x_operand, y_operand = block.operands
        self.x_operand, self.y_operand = x_operand, y_operand
        self.parts = 3 if block.split else 1
        self._config_apart = block.config(block.kernel_of_lines)

    @staticmethod
    def _normalized(x: Tensor, factor: Tensor | None) -> Tensor:
        # Written in half precision at once, without a copy in fp32.
        return x if factor is None else torch.mul(x, factor[:, None], out=torch.empty_like(x))

    @property
    def constants(self) -> dict[str, Any]:
        return {"SPREAD": self.spread, "ENLARGED": self.enlarged}

    def weigh(self, config: Config, chunk: Chunk, buffers: Buffers) -> None:
        """Makes the weights of a chunk. If lines may have shifts of their own, all kernels that can
        make them are launched, and the device's flags decide which one works."""
        if chunk.kept:
            self._weigh_from_kept(chunk, buffers.weights)
        elif not self.block.has_own_numbers:
            self._weigh_with_one_shift(config, chunk, buffers)
        if self.block.is_relative:
            lines = self.lines
            unless = lines.kept_is_valid if chunk.kept else lines.one_shift
            self._weigh_apart(chunk, buffers, unless)

    def _weigh_with_one_shift(self, config: Config, chunk: Chunk, buffers: Buffers) -> None:
        """Launches the kernels that work if all shifts are equal, or if there are none."""
        block, lines = self.block, self.lines
        weights, *sums, partial = buffers
        skipped = block.skipped(chunk)
        plain = chunk.plain_tiles(skipped)
        where = (*block.strides, self._stride(weights), block.offset_of(chunk), skipped)
        coefficients = lines.coefficients_of(chunk)[:4]
        given = (block.logits(chunk), lines.shifts, lines.one_shift, *coefficients)
        constants = {**block.functions, **self.constants}
        if plain:
            launch.launch(
                weight_kernels.weigh_kernel, block.programs(plain, config),
                *block.features(chunk, config), *given, launch.output_argument(weights, config),
                *sums, partial, chunk.rows, chunk.columns, *where, **constants,
                **block.plain_tiles(config),
            )  # fmt: skip
        if chunk.tiles > plain:
            launch.launch(
                weight_kernels.weigh_edges_kernel, chunk.tiles - plain, *block.features(chunk),
                *given, weights, *sums, self.positive[chunk.row_slice] if self.fold else None,
                partial, chunk.rows, chunk.columns, block.width, *where, **constants,
                **block.edge_tiles(config),
            )  # fmt: skip

    def _weigh_apart(self, chunk: Chunk, buffers: Buffers, unless: Tensor | None) -> None:
        """Launches the kernel with a number for each line, which works unless the flag is set."""
        block, config = self.block, self._config_apart
        chunk = self._cut_apart(chunk)
        weights, totals, sums, _ = buffers
        programs = chunk.tiles if unless is None else min(chunk.tiles, plan.SELDOM_PROGRAMS)
        launch.launch(
            weight_kernels.weigh_apart_kernel, programs, *block.features(chunk),
            block.logits(chunk), *self.lines.shifts_of(chunk), unless,
            *self.lines.coefficients_of(chunk), *block.targets_of(chunk), weights, totals, sums,
            chunk.rows, chunk.columns, block.width, *block.strides, self._stride(weights),
            block.offset_of(chunk), ACTIVATION=block.device_functions.activation,
            SAME_ID=block.same_id, **self.constants, **block.apart_tiles(config),
        )  # fmt: skip

    def _weigh_from_kept(self, chunk: Chunk, weights: Tensor | None) -> None:
        """Launches the kernel that reads kept weights, which works if they are valid."""
        if weights is None:
            return
        block, kept = self.block, self.kept.weights[chunk.row_slice, chunk.column_slice]
        factors = block.logits(chunk)[:2]
        programs = cdiv(chunk.rows, KEPT_TILE["BM"]) * cdiv(chunk.columns, KEPT_TILE["BN"])
        launch.launch(
            weigh_kept.weigh_kept_kernel, programs, kept, factors, self.lines.kept_is_valid,
            *self.lines.coefficients_of(chunk)[:2], weights, chunk.rows, chunk.columns,
            kept.stride(0), self._stride(weights), PRECISION=block.precision, **self.constants,
            **KEPT_TILE,
        )  # fmt: skip

    def _stride(self, weights: Tensor | None) -> int:
        """Returns the distance between rows of weights, or between the parts of a split row."""
        return 0 if weights is None else weights.stride(0) // self.parts

    def _cut_apart(self, chunk: Chunk) -> Chunk:
        """Returns the chunk, cut into tiles of the kernel with a number for each line."""
        config = self._config_apart
        return chunk._replace(bm=config.bm, bn=config.bn)

    def _cuts(self, chunk: Chunk) -> tuple[Tensor | None, Chunk | None, Chunk | None]:
        """Returns a flag and two versions of a chunk, cut into the tiles that write sums if the
        flag is set or absent, and if it is not set. None for a version: no tile writes sums."""
        apart = self._cut_apart(chunk)
        if not self.block.is_relative:
            return None, None if chunk.kept else chunk, None
        if chunk.kept:  # its sums come from the kept moments
            return self.lines.kept_is_valid, None, apart
        if self.block.has_own_numbers:
            return None, apart, None
        return self.lines.one_shift, chunk, apart

    def totals_of(self, chunk: Chunk) -> tuple[Tensor | None, int, int]:
        """Returns a flag, and how many tiles write a chunk's totals if it is set, and if not."""
        flag, *cuts = self._cuts(chunk)
        return flag, *(0 if cut is None else cut.tiles for cut in cuts)

    def _columns_of(self, chunk: Chunk) -> tuple[Tensor | None, int, int]:
        """Returns a flag, and how many rows of tiles write column sums if it is set, and if not."""
        flag, *cuts = self._cuts(chunk)
        return flag, *(0 if cut is None else cut.tiles_m for cut in cuts)

    def prepare(self, config: Config) -> tuple[list[Chunk], Buffers]:
        """Returns the chunks, and buffers that are large enough for each of them."""
        block = self.block
        itemsize = plan.SPLIT_BYTES if block.split else self.dtype.itemsize
        chunks = list(plan.weigh_chunks(block.m, block.n, config, itemsize, self.kept.rows))
        totals = block.empty(2 * max(max(self.totals_of(chunk)[1:]) for chunk in chunks))
        partial = block.empty(max(c.partials for c in chunks)) if self.fold else None
        weights = sums = None
        if self.by_column is not None:
            sums = block.empty(max(max(self._columns_of(c)[1:]) * c.columns for c in chunks))
        if self.needs_x or self.needs_y:
            stride = cdiv(max(c.columns for c in chunks), plan.COLUMN_UNIT) * plan.COLUMN_UNIT
            shape = (max(c.rows for c in chunks), self.parts * stride)
            weights = block.empty(*shape, dtype=self.dtype)
        return chunks, Buffers(weights, totals, sums, partial)

    def run(
        self, kernel: str, dx: Tensor, product_y: Tensor,
        complete_rows: Callable[[Tensor, Chunk], None] | None = None,
    ) -> LastChunk:  # fmt: skip
        """Runs all chunks. Products with y are written to dx if that is fp32, else to a buffer for
        the rows of one chunk. `complete_rows` turns the products of rows into gradients once they
        are complete, except for the last chunk's rows, which the caller completes. Products with x
        are written to product_y."""
        block = self.block

        def first(config: Config) -> None:
            chunks, buffers = self.prepare(config)
            made = (chunk for chunk in chunks if not chunk.kept)
            self.weigh(config, next(made, chunks[0]), buffers)

        config = block.config(kernel, first, "in one go" if self.fold else "")
        chunks, buffers = self.prepare(config)
        weights = buffers.weights
        totals = block.empty(2, dtype=torch.float64) if len(chunks) > 1 else None
        buffer_x = None
        if self.needs_x and dx.dtype != torch.float32:
            buffer_x = block.empty(max(c.rows for c in chunks), block.d)
        for index, chunk in enumerate(chunks):
            self.weigh(config, chunk, buffers)
            if self.fold:
                add_sums(block, chunk, buffers.partial, self.state, None, None, None)
            if self.by_column is not None:
                add_columns(chunk, buffers.sums, self.by_column, *self._columns_of(chunk))
            made, is_last = self.totals_of(chunk), index + 1 == len(chunks)
            if not is_last:  # the last launch adds the last chunk's totals
                launch.launch(
                    finalise.totals_kernel, 2, buffers.totals, totals, *made, int(index == 0),
                    LANES=LANES,
                )  # fmt: skip
            product = None
            if self.needs_x:
                product = dx[chunk.row_slice] if buffer_x is None else buffer_x[: chunk.rows]
                self._add_rows(weights, chunk, product)
            if self.needs_y:
                self._add_columns(weights, chunk, product_y[chunk.column_slice])
            if (
                not is_last
                and product is not None
                and chunk.column_stop == block.n
                and complete_rows
            ):
                complete_rows(product, chunk)
        return LastChunk(chunk, product, (buffers.totals, made[0], totals), made[1:])

    def _add_rows(self, weights: Tensor, chunk: Chunk, out: Tensor) -> None:
        """Adds weights @ y to the products of the chunk's rows."""
        y, begins = self.y_operand[chunk.column_slice], chunk.column_start == 0
        if self.block.split:
            self._add_split(weights, y, out, begins, transposed=False)
        else:
            accumulate(weights[: chunk.rows, : chunk.columns], y, out, begins)

    def _add_columns(self, weights: Tensor, chunk: Chunk, out: Tensor) -> None:
        """Adds weights.T @ x to the products of the chunk's columns."""
        x, begins = self.x_operand[chunk.row_slice], chunk.start == 0
        if self.block.split:
            self._add_split(weights, x, out, begins, transposed=True)
        else:
            accumulate(weights[: chunk.rows, : chunk.columns].T, x, out, begins)

    def _add_split(
        self, weights: Tensor, features: Tensor, out: Tensor, begins: bool, transposed: bool
    ) -> None:
        """Computes out = weights (or their transpose) @ features, or +=, with operands in parts."""

        def run(config: Config) -> None:
            programs = cdiv(len(out), config.bm) * cdiv(out.shape[1], config.bn)
            launch.launch(
                split_gradients.split_gradient_kernel, programs, weights, features, out, len(out),
                len(features), self._stride(weights), out.stride(0), D=self.block.d,
                WIDTH=self.block.depth, TRANSPOSED=transposed, BEGINS=begins, BM=config.bm,
                BN=config.bn, BK=config.bk, GROUP=config.group, num_warps=config.warps,
                num_stages=config.stages,
            )  # fmt: skip

        run(self.block.config("small" if self.block.is_small else "gradient"))
