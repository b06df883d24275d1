"""The host's side of the first sweep: the reference, the launches over chunks, and their sums."""

from __future__ import annotations

import torch
from torch import Tensor

from . import bound as bound_kernels
from . import card, finalise, fold, plan
from .block import Block
from .card import COLUMNS, LANES, ROWS
from .configurations import Config
from .plan import Chunk, cdiv

# Lines and partials of a program of `finalise.py`.
LINES, PARTS = 32, 64


def _squares(features: Tensor, factor: Tensor | None) -> Tensor | None:
    """Squared norms, the largest of each few rows; None where factors make them 1."""
    if factor is not None:
        return None
    programs = cdiv(features.shape[0], ROWS)
    squares = torch.empty(programs, dtype=torch.float32, device=features.device)
    card.launch(
        bound_kernels.longest_kernel, programs, features, squares, *features.shape,
        features.stride(0), ROWS=ROWS, BK=COLUMNS,
    )  # fmt: skip
    return squares


def reference_of(block: Block, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """The one reference, and the flag that will say whether it was too coarse."""
    reference, flag = block.empty(1), block.empty(1, dtype=torch.int32)
    if bound is None:
        squares = [_squares(block.x, block.factor_x), _squares(block.y, block.factor_y)]
        counts = [0 if s is None else s.numel() for s in squares]
    else:
        squares, counts = [None, None], [0, 0]
    card.launch(
        bound_kernels.reference_kernel, 1, bound, *squares, block.scale, reference, flag, *counts,
        LANES=LANES,
    )  # fmt: skip
    return reference, flag


def run_sweep(
    block: Block, config: Config, chunk: Chunk, reference: Tensor | None, positive: Tensor,
    kept: Tensor, partial: Tensor,
) -> None:  # fmt: skip
    kept_rows = kept.numel() // block.n
    keep = chunk.start < kept_rows
    card.launch(
        fold.sweep_kernel, chunk.programs, *block.part(chunk), reference,
        positive[chunk.row_slice], kept[chunk.start * block.n :] if keep else None, partial,
        chunk.rows, chunk.columns, *block.lengths, block.n, block.offset_of(chunk),
        kept_rows - chunk.start, FOLD=block.epilogue.fold, **block.tiles(config),
    )  # fmt: skip


def _programs_of_lines(chunk: Chunk) -> int:
    return cdiv(chunk.rows, LINES) + cdiv(chunk.columns, LINES)


def _lines(chunk: Chunk) -> tuple[int, ...]:
    """A chunk as `finalise.py` takes it."""
    return (
        chunk.rows, chunk.columns, chunk.tiles_m, chunk.tiles_n, chunk.start, chunk.column_start,
    )  # fmt: skip


def _begins_and_ends(block: Block, chunk: Chunk) -> tuple[int, ...]:
    """Whether its rows' states begin with this chunk, its columns' do, and all end with it."""
    return int(chunk.column_start == 0), int(chunk.start == 0), int(chunk.stop == block.m)


def add_sums(
    block: Block, chunk: Chunk, partial: Tensor, state: Tensor, positive: Tensor,
    reference: Tensor | None, flag: Tensor | None,
) -> None:  # fmt: skip
    card.launch(
        finalise.sums_kernel, _programs_of_lines(chunk), partial, state, positive, block.scale,
        reference, flag, *_lines(chunk), block.m, block.n, block.offset,
        *_begins_and_ends(block, chunk), LINES=LINES, PARTS=PARTS,
    )  # fmt: skip


def sweep_maxima(
    block: Block, config: Config, chunks: list[Chunk], partial: Tensor, state: Tensor, flag: Tensor
) -> None:
    """Where the flag is set the states are made anew, with a reference for each line."""
    for chunk in chunks:
        card.launch(
            fold.maxima_kernel, min(chunk.programs, plan.MAXIMA_PROGRAMS), *block.part(chunk),
            flag, partial, chunk.rows, chunk.columns, *block.lengths, block.offset_of(chunk),
            FOLD=block.epilogue.fold, **block.tiles(config),
        )  # fmt: skip
        card.launch(
            finalise.maxima_sums_kernel, _programs_of_lines(chunk), partial, state, flag,
            *_lines(chunk), block.m, block.n, *_begins_and_ends(block, chunk),
            LINES=LINES, PARTS=PARTS,
        )  # fmt: skip
