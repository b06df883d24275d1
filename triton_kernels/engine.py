"""The host's side of the Triton engine: `ops.py`'s operators for CUDA tensors.

Nothing here waits for the device: what depends on data (the reference, whether it was enough,
whether one exponential serves) is decided there, so every call can be captured in a CUDA graph.
Launches go to the current stream of the features' device. float64 is the plain engine's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from fastclip import chunked
from torch import Tensor

from . import bound as bounds
from . import complete, configurations, finalise, fold, plan
from . import weights as weighing
from .configurations import Config
from .epilogues import EPILOGUES, INTERPRETED
from .plan import Chunk, cdiv

# Lines and partials of a program of `finalise.py`; lanes of single programs.
LINES, PARTS, LANES = 32, 64, 1024
# Rows and columns of a program that goes over features alone. The interpreter takes as long for
# many as for few.
ROWS, COLUMNS = (64 if INTERPRETED.value else 8), 128


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    kernel[(programs,)](*arguments, **constants)


def _on_its_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operator)
    def run(x: Tensor, *arguments: Any) -> Any:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"the Triton engine takes float32, bfloat16 and float16 features, got {x.dtype}: "
                "float64 is the engine 'torch''s"
            )
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return operator(x, *arguments)

    return run


def _takes_tf32(x: Tensor) -> bool:
    """Whether the user lets fp32 matmuls round their operands to tf32."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return allowed and x.dtype == torch.float32 and not torch.version.hip


class _Block:
    """A rectangular block of logits as the kernels take it."""

    def __init__(
        self, x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None,
        scale: Tensor, bias: Tensor | None, offset: int, loss: str,
    ) -> None:  # fmt: skip
        if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or x.dtype != y.dtype:
            raise ValueError(
                "x and y must be (M, D) and (N, D) of one dtype, got "
                f"{tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}"
            )
        self.m, self.n, self.d = x.shape[0], y.shape[0], x.shape[1]
        if not (self.m and self.n and self.d):
            raise ValueError(f"x and y must not be empty, got {tuple(x.shape)}, {tuple(y.shape)}")
        self.epilogue = EPILOGUES[loss]
        self.tf32 = _takes_tf32(x)
        self.x, self.y = (self._operand(t) for t in (x, y))
        self.factor_x, self.factor_y = (
            None if f is None else f.to(torch.float32).contiguous() for f in (factor_x, factor_y)
        )
        self.scale, self.bias = scale, bias if self.epilogue.uses_bias else None
        self.unit = self._unit()
        # Beyond the block every offset is alike; within 32 bits there is one kernel for all.
        self.offset = max(-self.m, min(offset, self.n))

    def _operand(self, x: Tensor) -> Tensor:
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        if not self.tf32:
            return x
        rounded = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch(
            weighing.to_tf32_kernel, cdiv(x.shape[0], ROWS), x, rounded, *x.shape, x.stride(0),
            ROWS=ROWS, BK=COLUMNS,
        )  # fmt: skip
        return rounded

    def _unit(self) -> int:
        """Elements in 16 bytes, if every row of both towers begins on 16 bytes, else 1."""
        unit = 16 // self.x.element_size()
        for t in (self.x, self.y):
            if t.data_ptr() % 16 or t.shape[1] % unit or t.stride(0) % unit:
                return 1
        return unit

    def part(self, chunk: Chunk) -> tuple[Any, ...]:
        """The features of a chunk, which is a block of its own."""
        fx, fy = self.factor_x, self.factor_y
        rows, columns = chunk.row_slice, chunk.column_slice
        return (
            self.x[rows], self.y[columns], None if fx is None else fx[rows],
            None if fy is None else fy[columns], self.scale, self.bias,
        )  # fmt: skip

    def offset_of(self, chunk: Chunk) -> int:
        """Of a chunk; again within 32 bits."""
        offset = self.offset + chunk.start - chunk.column_start
        return max(-chunk.rows, min(offset, chunk.columns))

    @property
    def lengths(self) -> tuple[int, int, int]:
        """D and the strides of rows, in units."""
        unit = self.unit
        return self.d // unit, self.x.stride(0) // unit, self.y.stride(0) // unit

    def tiles(self, config: Config) -> dict[str, Any]:
        """Compile-time arguments of a kernel that makes tiles."""
        return {
            "BM": config.bm, "BN": config.bn, "BK": config.bk, "GROUP": config.group,
            "EVEN": self.d % config.bk == 0, "PRECISION": "tf32" if self.tf32 else "ieee",
            "UNIT": self.unit, "num_warps": config.warps, "num_stages": config.stages,
        }  # fmt: skip

    def config(self, kernel: str, run: Callable[[Config], object] | None = None) -> Config:
        x = self.x
        return configurations.choose(x.device, x.dtype, self.tf32, self.d, self.unit, kernel, run)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def new_states(self) -> tuple[Tensor, Tensor]:
        positive = torch.full((self.m,), torch.nan, dtype=torch.float64, device=self.x.device)
        return self.empty(2, self.m + self.n, dtype=torch.float64), positive


# ---- sweep ---------------------------------------------------------------------------------------


def _squares(features: Tensor, factor: Tensor | None) -> Tensor | None:
    """Squared norms, the largest of each few rows; None where factors make them 1."""
    if factor is not None:
        return None
    programs = cdiv(features.shape[0], ROWS)
    squares = torch.empty(programs, dtype=torch.float32, device=features.device)
    _launch(
        bounds.longest_kernel, programs, features, squares, *features.shape, features.stride(0),
        ROWS=ROWS, BK=COLUMNS,
    )  # fmt: skip
    return squares


def _reference(block: _Block, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """The one reference, and the flag that will say whether it was too coarse."""
    reference, flag = block.empty(1), block.empty(1, dtype=torch.int32)
    if bound is None:
        squares = [_squares(block.x, block.factor_x), _squares(block.y, block.factor_y)]
        counts = [0 if s is None else s.numel() for s in squares]
    else:
        squares, counts = [None, None], [0, 0]
    _launch(
        bounds.reference_kernel, 1, bound, *squares, block.scale, reference, flag, *counts,
        LANES=LANES,
    )  # fmt: skip
    return reference, flag


def _run_sweep(
    block: _Block, config: Config, chunk: Chunk, reference: Tensor | None, positive: Tensor,
    kept: Tensor, partial: Tensor,
) -> None:  # fmt: skip
    kept_rows = kept.numel() // block.n
    keep = chunk.start < kept_rows
    _launch(
        fold.sweep_kernel, chunk.programs, *block.part(chunk), reference,
        positive[chunk.row_slice], kept[chunk.start * block.n :] if keep else None, partial,
        chunk.rows, chunk.columns, *block.lengths, block.n, block.offset_of(chunk), kept_rows - chunk.start, FOLD=block.epilogue.fold,
        **block.tiles(config),
    )  # fmt: skip


def _programs_of_lines(chunk: Chunk) -> int:
    return cdiv(chunk.rows, LINES) + cdiv(chunk.columns, LINES)


def _lines(chunk: Chunk) -> tuple[int, ...]:
    """A chunk as `finalise.py` takes it."""
    return (
        chunk.rows, chunk.columns, chunk.tiles_m, chunk.tiles_n, chunk.start, chunk.column_start,
    )  # fmt: skip


def _begins_and_ends(block: _Block, chunk: Chunk) -> tuple[int, ...]:
    """Whether its rows' states begin with this chunk, its columns' do, and all end with it."""
    return int(chunk.column_start == 0), int(chunk.start == 0), int(chunk.stop == block.m)


def _add_sums(
    block: _Block, chunk: Chunk, partial: Tensor, state: Tensor, positive: Tensor,
    reference: Tensor | None, flag: Tensor | None,
) -> None:  # fmt: skip
    _launch(
        finalise.sums_kernel, _programs_of_lines(chunk), partial, state, positive, block.scale,
        reference, flag, *_lines(chunk), block.m, block.n, block.offset,
        *_begins_and_ends(block, chunk), LINES=LINES, PARTS=PARTS,
    )  # fmt: skip


def _sweep_maxima(
    block: _Block, config: Config, chunks: list[Chunk], partial: Tensor, state: Tensor, flag: Tensor
) -> None:
    """Where the flag is set the states are made anew, with a reference for each line."""
    for chunk in chunks:
        _launch(
            fold.maxima_kernel, min(chunk.programs, plan.MAXIMA_PROGRAMS), *block.part(chunk),
            flag, partial, chunk.rows, chunk.columns, *block.lengths, block.offset_of(chunk), FOLD=block.epilogue.fold,
            **block.tiles(config),
        )  # fmt: skip
        _launch(
            finalise.maxima_sums_kernel, _programs_of_lines(chunk), partial, state, flag,
            *_lines(chunk), block.m, block.n, *_begins_and_ends(block, chunk),
            LINES=LINES, PARTS=PARTS,
        )  # fmt: skip


@_on_its_device
def sweep(
    x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None, scale: Tensor,
    bias: Tensor | None, bound: Tensor | None, offset: int, loss: str, keep: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.py`'s sweep. What it keeps are the leading rows of t, whichever tower is longer."""
    block = _Block(x, y, factor_x, factor_y, scale, bias, offset, loss)
    state, positive = block.new_states()
    kept = block.empty(keep * min(block.m, block.n))
    reference = flag = None
    if block.epilogue.needs_state:
        reference, flag = _reference(block, bound)

    by_maxima = block.config("maxima")

    def prepare(config: Config) -> tuple[list[Chunk], list[Chunk], Tensor]:
        chunks = plan.sweep(block.m, block.n, config, 1)
        again = [] if flag is None else plan.sweep(block.m, block.n, by_maxima, 2)
        sizes = [chunk.partials for chunk in chunks] + [2 * chunk.partials for chunk in again]
        return chunks, again, block.empty(max(sizes))

    def first(config: Config) -> None:
        chunks, _, partial = prepare(config)
        _run_sweep(block, config, chunks[0], reference, positive, kept, partial)

    config = block.config("sweep" if block.epilogue.is_light else f"sweep, {loss}", first)
    chunks, again, partial = prepare(config)
    for chunk in chunks:
        _run_sweep(block, config, chunk, reference, positive, kept, partial)
        _add_sums(block, chunk, partial, state, positive, reference, flag)
    if flag is not None:
        _sweep_maxima(block, by_maxima, again, partial, state, flag)
    return state, positive, kept


# O(M + N), and plain PyTorch on the device.
finish = chunked.finish


# ---- weigh ---------------------------------------------------------------------------------------


def _accumulate(a: Tensor, b: Tensor, out: Tensor, begins: bool) -> None:
    """out = a @ b, or out += a @ b: a library product that accumulates in fp32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out) if begins else torch.addmm(out, a, b, out=out)
    elif a.is_cuda:
        if begins:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        product = a.to(out.dtype) @ b.to(out.dtype)
        out.copy_(product) if begins else out.add_(product)


class _Weighing:
    """The second sweep of a block, or both in one go (`also_fold`)."""

    def __init__(
        self, block: _Block, state: Tensor, positive: Tensor, coefficients: Tensor | None,
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
        self.one = None
        if block.epilogue.needs_state:
            self.one = (state[0] == state[0, 0]).all().view(torch.uint8)

    @staticmethod
    def _unit(x: Tensor, factor: Tensor | None) -> Tensor:
        return x if factor is None else (x * factor[:, None]).to(x.dtype)

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
        write = weights is not None
        _launch(
            weighing.weigh_kernel, chunk.programs, x, *others,
            *(references if self.one is not None else (None, None)), self.one,
            *(2 * (None,) if (c := self.coefficients) is None else (c[rows], c[columns])), weights, totals,
            self.positive[rows] if self.fold else None, partial, chunk.rows, chunk.columns,
            width, stride, stride_y, weights.stride(0) if write else 0,
            block.offset_of(chunk), KEPT=chunk.kept, SPREAD=self.spread, ENLARGED=self.enlarged,
            FOLD=block.epilogue.fold, ACTIVATION=block.epilogue.activation, **block.tiles(config),
        )  # fmt: skip

    def run(self, config: Config, dx: Tensor, dy: Tensor, tail: _Tail | None) -> Tensor:
        """Fills dy with products, dx with gradients; returns the negatives' totals."""
        block = self.block
        itemsize = block.x.element_size()
        chunks = list(plan.weigh(block.m, block.n, config, itemsize, self.kept_rows))
        tiles = max(chunk.programs for chunk in chunks)
        totals, sums = block.empty(2, dtype=torch.float64), block.empty(2 * tiles)
        partial = block.empty(max(c.partials for c in chunks)) if self.fold else None
        weights = None
        if self.needs_x or self.needs_y:
            stride = cdiv(max(c.columns for c in chunks), plan.COLUMN_UNIT) * plan.COLUMN_UNIT
            weights = block.empty(max(c.rows for c in chunks), stride, dtype=block.x.dtype)
        room = None
        if self.needs_x and dx.dtype != torch.float32:
            room = block.empty(max(c.rows for c in chunks), block.d)
        for index, chunk in enumerate(chunks):
            self.weigh(config, chunk, weights, sums, partial)
            _launch(
                finalise.totals_kernel, 2, sums, totals, chunk.programs, int(index == 0), LANES=LANES
            )
            if self.fold:
                _add_sums(block, chunk, partial, self.state, self.positive, None, None)
            if weights is None:
                continue
            w = weights[: chunk.rows, : chunk.columns]
            if self.needs_x:
                product = dx[chunk.row_slice] if room is None else room[: chunk.rows]
                begins = chunk.column_start == 0
                _accumulate(w, self.y_operand[chunk.column_slice], product, begins)
                if tail is not None and chunk.column_stop == block.n:
                    tail.finish_rows(product, dx[chunk.row_slice], chunk.start)
            if self.needs_y:
                x = self.x_operand[chunk.row_slice]
                _accumulate(w.T, x, dy[chunk.column_slice], chunk.start == 0)
        return totals


class _Tail:
    """What follows the products: positives, factors, gain, scale."""

    def __init__(
        self, sweep: _Weighing, positive_weight: Tensor, gain: Tensor, project: bool
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
        _launch(
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
        _launch(
            complete.complete_totals_kernel, 1, totals, self.weight, self.sweep.positive, self.gain,
            out, self.block.m, self.block.n, self.block.offset, LANES=LANES,
        )  # fmt: skip
        return out


@_on_its_device
def weigh(
    x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None, scale: Tensor,
    bias: Tensor | None, state: Tensor, positive: Tensor, coefficients: Tensor,
    positive_weight: Tensor, gain: Tensor, kept: Tensor, offset: int, loss: str, needs_x: bool,
    needs_y: bool, project: bool, dtype_x: torch.dtype, dtype_y: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.py`'s weigh: a chunk of weights, two products of it with the features, the next chunk."""
    block = _Block(x, y, factor_x, factor_y, scale, bias, offset, loss)
    work = _Weighing(
        block, state, positive.contiguous(), coefficients, (needs_x, needs_y), kept=kept
    )
    tail = _Tail(work, positive_weight, gain, project)
    dx = block.empty(block.m if needs_x else 0, block.d, dtype=dtype_x)
    dy = block.empty(block.n if needs_y else 0, block.d, dtype=dtype_y)
    product = dy if dtype_y == torch.float32 else block.empty(*dy.shape)
    totals = work.run(block.config("weigh"), dx, product, tail)
    if needs_y:
        tail.finish_columns(product, dy)
    return dx, dy, tail.totals(totals)


@_on_its_device
def sweep_and_weigh(
    x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None, scale: Tensor,
    bias: Tensor | None, gain: Tensor, offset: int, loss: str, needs_x: bool, needs_y: bool,
    project: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.py`'s sweep_and_weigh: every tile is made once, folded and weighed."""
    block = _Block(x, y, factor_x, factor_y, scale, bias, offset, loss)
    if block.epilogue.needs_state:
        raise ValueError(
            "only a loss whose weights need no state can be swept and weighed in one go, got "
            f"{loss!r}"
        )
    state, positive = block.new_states()
    work = _Weighing(block, state, positive, None, (needs_x, needs_y), also_fold=True)
    dx = block.empty(block.m if needs_x else 0, block.d)
    dy = block.empty(block.n if needs_y else 0, block.d)
    totals = work.run(block.config("both"), dx, dy, None)
    # Only now the positives, whose weights the gradients wait for, are known.
    _, _, weights = finish(state[:, : block.m], positive, scale, block.bias, loss)
    tail = _Tail(work, weights, gain, project)
    if needs_x:
        tail.finish_rows(dx, dx, 0)
    if needs_y:
        tail.finish_columns(dy, dy)
    return state, positive, dx, dy, tail.totals(totals)
