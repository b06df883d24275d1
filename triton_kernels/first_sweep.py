"""The host's side of the first sweep: the shift, launches over chunks, and their sums."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, plan
from .configurations import Config
from .kept import Kept
from .kernels import bound as bound_kernels
from .kernels import finalise, sweep
from .launch import COLUMNS, LANES, ROWS
from .logit_block import LogitBlock
from .plan import Chunk, cdiv

# Lines that a program of `kernels/finalise.py` owns, and partials that it adds up at a time.
LINES, PARTIALS = 32, 64


def shift_of(block: LogitBlock, bound: Tensor | None, kept: Kept) -> tuple[Tensor, Tensor]:
    """Returns the shift that all lines share, and the flag that says if it was too coarse."""
    shift, flag = block.empty(1), block.empty(1, dtype=torch.int32)
    counts, squares = [0, 0], None
    if bound is None:
        # Features with factors have norm 1: their rows are left out.
        rows = [
            0 if factor is not None else len(features)
            for features, factor in ((block.x, block.factor_x), (block.y, block.factor_y))
        ]
        counts = [cdiv(count, ROWS) for count in rows]
        if any(counts):
            squares = block.empty(sum(counts))
            launch.launch(
                bound_kernels.longest_kernel, sum(counts), block.x, block.y, squares, *rows,
                block.d, block.x.stride(0), block.y.stride(0), ROWS=ROWS, BK=COLUMNS,
            )  # fmt: skip
    launch.launch(
        bound_kernels.shift_kernel, 1, bound, squares, block.scale, block.largest_bias,
        shift, kept.shift, flag, *counts, LANES=LANES,
    )  # fmt: skip
    return shift, flag


def run_sweep(
    block: LogitBlock, config: Config, chunk: Chunk, shift: Tensor | None, positive: Tensor,
    kept: Kept, partial: Tensor,
) -> None:  # fmt: skip
    """Sweeps all tiles of a chunk, plain ones and those of the edges, with one shift or none."""
    skipped = block.skipped(chunk)
    plain = chunk.plain_tiles(skipped)
    kept_weights = kept.weights[chunk.row_slice] if chunk.kept else None
    stride_kept = kept_weights.stride(0) if chunk.kept else 0
    sizes = (chunk.rows, chunk.columns)
    where = (*block.strides, stride_kept, block.offset_of(chunk), skipped)
    if plain:
        launch.launch(
            sweep.sweep_kernel, block.programs(plain, config), *block.features(chunk, config),
            block.logits(chunk), shift, launch.output_argument(kept_weights, config), partial,
            *sizes, *where, **block.functions, **block.plain_tiles(config),
        )  # fmt: skip
    if chunk.tiles > plain:
        launch.launch(
            sweep.sweep_edges_kernel, chunk.tiles - plain, *block.features(chunk),
            block.logits(chunk), shift, positive[chunk.row_slice], kept_weights, partial, *sizes,
            block.width, *where, **block.functions, **block.edge_tiles(config),
        )  # fmt: skip


def _programs_of_lines(chunk: Chunk) -> int:
    return cdiv(chunk.rows, LINES) + cdiv(chunk.columns, LINES)


def _lines(chunk: Chunk) -> tuple[int, ...]:
    """Returns the sizes of a chunk in the order that `kernels/finalise.py` takes."""
    return (
        chunk.rows, chunk.columns, chunk.tiles_m, chunk.tiles_n, chunk.start, chunk.column_start,
    )  # fmt: skip


def _begins_and_ends(block: LogitBlock, chunk: Chunk) -> tuple[int, ...]:
    """Returns three flags: the chunk is the first of its rows; of its columns; the last of all."""
    return int(chunk.column_start == 0), int(chunk.start == 0), int(chunk.stop == block.m)


def add_sums(
    block: LogitBlock, chunk: Chunk, partial: Tensor, state: Tensor, occupied: Tensor | None,
    shift: Tensor | None, flag: Tensor | None,
) -> None:  # fmt: skip
    """Adds a chunk's partial sums, which share one shift or have none, to the states."""
    for index in range(block.folds):
        launch.launch(
            finalise.sums_kernel, _programs_of_lines(chunk), partial[index * chunk.partials :],
            state[2 * index :], None if occupied is None else occupied[index], shift, flag,
            *_lines(chunk), block.m, block.n, block.offset, *_begins_and_ends(block, chunk),
            LINES=LINES, PARTIALS=PARTIALS,
        )  # fmt: skip


def add_columns(
    chunk: Chunk, partial: Tensor, out: Tensor, flag: Tensor | None, tiles: int, otherwise: int
) -> None:
    """Adds up weights over the rows of a chunk: sums of `tiles` rows of tiles if the flag is set or
    absent, else of `otherwise` rows of tiles."""
    launch.launch(
        finalise.columns_kernel, cdiv(chunk.columns, LINES), partial, out[chunk.column_slice], flag,
        chunk.columns, tiles, otherwise, int(chunk.start == 0), LINES=LINES, PARTIALS=PARTIALS,
    )  # fmt: skip


def add_moments(block: LogitBlock, chunk: Chunk, partial: Tensor, kept: Kept) -> None:
    """Adds a chunk's sums of kept weights w and of w * t to the moments."""
    launch.launch(
        finalise.moments_kernel, _programs_of_lines(chunk), partial, kept.moments, kept.shift,
        *_lines(chunk), block.m, block.n, *_begins_and_ends(block, chunk), FIRST=1, LINES=LINES,
        PARTIALS=PARTIALS,
    )  # fmt: skip


def sweep_apart(
    block: LogitBlock, config: Config, chunks: list[Chunk], partial: Tensor, state: Tensor,
    positive: Tensor | None, levels: Tensor | None, kept: Kept, flag: Tensor | None,
) -> None:  # fmt: skip
    """Makes states with a number of its own for each line: its level if levels are given, its
    shift, or 0 in a kind without either. With a flag, this repeats a sweep, and works only if the
    flag is set. Without a flag it is the only sweep, and stores the positives, too."""
    for chunk in chunks:
        programs = chunk.tiles if flag is None else min(chunk.tiles, plan.SELDOM_PROGRAMS)
        of_lines = (None, None)
        if levels is not None:
            of_lines = levels[chunk.row_slice], levels[block.m :][chunk.column_slice]
        launch.launch(
            sweep.sweep_apart_kernel, programs, *block.features(chunk), block.logits(chunk), flag,
            *of_lines, *block.targets_of(chunk),
            None if positive is None else positive[chunk.row_slice], partial, chunk.rows,
            chunk.columns, block.width, *block.strides, block.offset_of(chunk), **block.functions,
            SHIFTED=block.kind.has_shift, **block.apart_tiles(config),
        )  # fmt: skip
        for index in range(block.folds + block.has_teacher):
            is_teacher = index == block.folds
            layers = partial[plan.APART_LAYERS * index * chunk.partials :]
            if block.kind.has_shift or is_teacher:
                launch.launch(
                    finalise.maxima_sums_kernel, _programs_of_lines(chunk), layers,
                    state[2 * index :], flag, kept.shift, *_lines(chunk), block.m, block.n,
                    *_begins_and_ends(block, chunk), TAUGHT=is_teacher, LINES=LINES,
                    PARTIALS=PARTIALS,
                )  # fmt: skip
            else:
                launch.launch(
                    finalise.moments_kernel, _programs_of_lines(chunk), layers, state[2 * index :],
                    None, *_lines(chunk), block.m, block.n, *_begins_and_ends(block, chunk),
                    FIRST=0, LINES=LINES, PARTIALS=PARTIALS,
                )  # fmt: skip
