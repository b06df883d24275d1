"""The shifts and coefficients of lines, as the second sweep takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .kept import Kept
from .kernels import finalise
from .launch import LANES
from .logit_block import LogitBlock
from .plan import Chunk, cdiv


class Lines:
    """The shifts, or levels, and coefficients of all lines, rows first, as the second sweep takes
    them: a and b for negatives, c and d for positives by id and for a teacher. Coefficients are
    None in `sweep_and_weigh`, where a_i + b_j is 1 for every pair. The device sets two flags:
    `one_shift` if all shifts are equal, `kept_is_valid` if the kept weights may be used."""

    def __init__(
        self, block: LogitBlock, state: Tensor, coefficients: Tensor | None, kept: Kept
    ) -> None:
        self.rows, self.lines = block.m, block.m + block.n
        self.same_id_positive, self.has_teacher = block.same_id_positive, block.has_teacher
        shifts = state[: len(state) // 2 * 2 : 2]  # not a teacher's sums of t
        self.shifts = shifts.contiguous() if block.is_relative else None
        self.coefficients = self.in_float64 = coefficients
        self.one_shift = self.kept_is_valid = None
        if coefficients is None or block.has_own_numbers or (block.is_small and kept.rows == 0):
            return
        numbers = coefficients.numel()
        self.coefficients = block.empty(numbers)
        flags = block.empty(2, dtype=torch.int32)
        launch.launch(
            finalise.lines_kernel, cdiv(numbers, LANES) + 1, self.shifts, coefficients,
            kept.shift, flags, self.coefficients, numbers, LANES=LANES,
        )  # fmt: skip
        if self.shifts is not None:
            self.one_shift = flags[:1]
        if kept.rows:
            self.kept_is_valid = flags[1:]

    def _of(self, values: Tensor | None, chunk: Chunk) -> tuple[Tensor | None, ...]:
        """Returns the values of a chunk's lines: for negatives the rows' and the columns', then for
        positives by id, then for a teacher."""
        if values is None:
            return (None,) * 6
        columns = slice(self.rows + chunk.column_start, self.rows + chunk.column_stop)
        sets = values.view(-1, self.lines)
        found = [part for v in sets for part in (v[chunk.row_slice], v[columns])]
        absent = (None, None)
        same = found[2:4] if self.same_id_positive else absent
        return *found[:2], *same, *(found[-2:] if self.has_teacher else absent)

    def shifts_of(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        return self._of(self.shifts, chunk)

    def coefficients_of(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        return self._of(self.coefficients, chunk)
