"""The engine in plain PyTorch: `sweep` and `weigh` of `ops.py` on any device.

It streams chunks of rows, so at most a chunk of the (M, N) matrix exists, in the forward and in
the backward. It is the engine where no compiled one can run, and the shortest text to learn the
algorithm from. `_Tiles` makes a chunk of t and says which pairs count; everything else is the
kind's own `fold` and `activation`, and where the sums go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..kinds import LOG2E, Kind, kind_of
from .block import Block, Side, Statistics, Upstream, Wanted
from .operator_checks import accumulation_dtype, state_dtype

# Elements of a chunk: 8 MiB in fp32, of which up to four live at a time.
CHUNK = 1 << 21


def _multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, operands as they are, accumulated and returned in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _chunks(m: int, n: int) -> Iterator[slice]:
    rows = max(1, CHUNK // n)
    return (slice(start, min(start + rows, m)) for start in range(0, m, rows))


class _Tiles:
    """A block of logits, of which chunks of rows are made on demand."""

    def __init__(self, block: Block) -> None:
        self.block, self.kind = block, kind_of(block.kind)
        x, y = block.x.features, block.y.features
        self.dtype = accumulation_dtype(x)
        self.scale = block.scale.reshape(()).to(state_dtype(x.device)) * LOG2E
        # Added to the logits of each column, or of all.
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
        """(C, N), of a chunk of rows."""
        x, y = self.block.x, self.block.y
        t = _multiply(x.features[rows], y.features.T, self.dtype)
        if x.factor is not None:
            t *= x.factor[rows, None]
        if y.factor is not None:
            t *= y.factor
        return t

    def logits(self, t: Tensor) -> Tensor:
        """In log2 units."""
        logit = t * self.scale.to(self.dtype)
        return logit if self.bias is None else logit + self.bias.to(logit.dtype)

    def pairs(self, rows: slice, t: Tensor) -> _Pairs:
        x, y = self.block.x, self.block.y
        partners = torch.arange(rows.start, rows.stop, device=t.device) + self.block.offset
        negatives = partners[:, None] != self.columns
        positives = None
        if x.ids is not None:
            same = x.ids[rows, None] == y.ids
            positives = same & negatives if self.block.same_id_positive else None
            negatives = negatives & ~same
        if x.threshold is None:
            return _Pairs(negatives, negatives, positives)
        # A NaN counts, and spoils the line as it should.
        return _Pairs(
            negatives & ~(t > x.threshold[rows, None]), negatives & ~(t > y.threshold), positives
        )


class _Pairs(NamedTuple):
    """Which pairs of a chunk count, (C, N)."""

    rows: Tensor  # as negatives of their rows
    columns: Tensor  # as negatives of their columns
    positives: Tensor | None  # by id, of both


def _largest(logit: Tensor, dim: int) -> Tensor:
    """The shift of each line: its largest logit, or 0 for one without pairs."""
    largest = logit.amax(dim)
    return torch.where(largest == -torch.inf, 0, largest.ceil())


def _add(
    kind: type[Kind], logit: Tensor, counts: Tensor, dim: int, shift: Tensor, sums: Tensor
) -> None:
    """Adds a chunk's pairs to the states of its rows (dim 1) or columns (dim 0)."""
    if kind.has_shift:
        logit = torch.where(counts, logit, -torch.inf)
        here = _largest(logit, dim)
        found = kind.fold(logit, here.unsqueeze(dim)).sum(dim)
        merge(shift, sums, here.to(shift.dtype), found.to(sums.dtype))
    else:
        folded = kind.fold(logit, shift.new_zeros(())).masked_fill(~counts, 0)
        sums += folded.sum(dim, dtype=sums.dtype)


def sweep(
    block: Block, bound: Tensor | None, occupied: Tensor | None, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.py`'s sweep. A shift for each line, so neither bound nor occupied is needed; nothing is
    kept."""
    if keep:
        raise ValueError(f"keep must be 0: the plain PyTorch engine keeps nothing, got {keep}")
    tiles, kind = _Tiles(block), kind_of(block.kind)
    x, (m, n) = block.x.features, block.sizes()
    state = torch.zeros(
        (4 if block.same_id_positive else 2, m + n), dtype=state_dtype(x.device), device=x.device
    )
    positive = torch.full((m,), torch.nan, dtype=state.dtype, device=x.device)
    sign = -1 if kind.negates_positives else 1
    for rows in tiles.chunks():
        t = tiles.t(rows)
        logit, pairs = tiles.logits(t), tiles.pairs(rows, t)
        _note_positives(positive[rows], tiles, t, rows.start + block.offset)
        by_row, by_column = state[:, :m][:, rows], state[:, m:]
        _add(kind, logit, pairs.rows, 1, *by_row[:2])
        _add(kind, logit, pairs.columns, 0, *by_column[:2])
        if pairs.positives is not None:
            _add(kind, sign * logit, pairs.positives, 1, *by_row[2:])
            _add(kind, sign * logit, pairs.positives, 0, *by_column[2:])
    return state, positive, x.new_empty((0,), dtype=tiles.dtype)


def _note_positives(positive: Tensor, tiles: _Tiles, t: Tensor, offset: int) -> None:
    """The diagonal of a chunk that begins `offset` columns right of its first column."""
    if not -t.shape[0] < offset < t.shape[1]:
        return
    diagonal = t.diagonal(offset)
    if tiles.kind.has_shift:
        # t as the rounded logits have it: a positive must tie with its duplicates among them.
        exact = (diagonal * tiles.scale.to(t.dtype)).to(positive.dtype) / tiles.scale
        diagonal = torch.where(tiles.scale == 0, diagonal.to(positive.dtype), exact)
    first = max(0, -offset)
    positive[first : first + len(diagonal)] = diagonal.to(positive.dtype)


def merge(shift: Tensor, sum: Tensor, other_shift: Tensor, other_sum: Tensor) -> None:
    """Adds other states to states, in place: the same merge serves chunks, ring steps and ranks."""
    shift_is_free = sum == 0
    other_is_free = other_sum == 0
    top = torch.maximum(shift, other_shift)
    top = torch.where(shift_is_free, other_shift, top)
    top = torch.where(other_is_free & ~shift_is_free, shift, top)
    mine = torch.where(shift_is_free, 0, sum * torch.exp2(shift - top))
    theirs = torch.where(other_is_free, 0, other_sum * torch.exp2(other_shift - top))
    sum.copy_(mine + theirs)
    shift.copy_(top)


def finish(
    state: Tensor, positive: Tensor, scale: Tensor, bias: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.py`'s finish: the loss's own, with each line's positive beside its state."""
    s = positive.repeat(state.shape[1] // positive.shape[0]) * scale.reshape(()).to(state.dtype)
    if bias is not None and not kind_of(kind).has_shift:
        s = s + bias.reshape(()).to(s.dtype)
    return kind_of(kind).finish(*state, s)


class _Lines(NamedTuple):
    """Shifts and coefficients of lines, which weights are made of."""

    rows: tuple[Tensor, Tensor]  # shifts and coefficients (M)
    columns: tuple[Tensor, Tensor]  # (N)

    @classmethod
    def of(cls, shift: Tensor, coefficients: Tensor, m: int) -> _Lines:
        return cls((shift[:m], coefficients[:m]), (shift[m:], coefficients[m:]))

    def weights(
        self, kind: type[Kind], logit: Tensor, rows: slice, counts: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The weights of a chunk's pairs, as far as they count for rows and for columns."""
        (row_shift, a), (column_shift, b) = self
        row_shift, a = row_shift[rows, None], a[rows, None]
        # Filled in after the product: what does not count may exceed its line's shift by any power.
        if kind.has_shift:
            w = (kind.activation(logit, row_shift) * a).masked_fill_(~counts[0], 0)
            w += (kind.activation(logit, column_shift) * b).masked_fill_(~counts[1], 0)
            return w
        activation = kind.activation(logit, row_shift.new_zeros(()))
        if counts[0] is counts[1]:
            return (activation * (a + b)).masked_fill_(~counts[0], 0)
        w = (activation * a).masked_fill_(~counts[0], 0)
        return w.add_((activation * b).masked_fill_(~counts[1], 0))


def weigh(
    block: Block, statistics: Statistics, upstream: Upstream, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.py`'s weigh: the weights of a chunk, its sums, and two products with the features."""
    tiles, kind = _Tiles(block), kind_of(block.kind)
    dtype, (m, n) = tiles.dtype, block.sizes()
    x, y, scale = block.x, block.y, block.scale
    state, positive, _ = statistics
    shifts = state[::2].to(dtype)
    coefficients = upstream.coefficients.reshape(-1, m + n).to(dtype)
    lines = [_Lines.of(*both, m) for both in zip(shifts, coefficients, strict=True)]
    positive_weight = upstream.positive_weight.to(state.dtype)
    # A half-precision product takes the weights in the features' dtype. They are at most 2; fp16
    # would lose those below 6e-8 and blur those below 6e-5, so it takes them as large as it can.
    narrow = x.features.is_cuda and x.features.dtype != dtype
    enlarged = 2.0**13 if narrow and x.features.dtype == torch.float16 else 1.0
    width, device = x.features.shape[1], x.features.device
    dx = torch.empty((m if wanted.x else 0, width), dtype=wanted.dtype_x, device=device)
    dy = torch.zeros((n if wanted.y else 0, width), dtype=dtype, device=device)
    totals = torch.zeros((2,), dtype=state.dtype, device=device)
    by_column = torch.zeros((n if wanted.key_bias else 0,), dtype=state.dtype, device=device)
    gain = upstream.gain.reshape(()).to(state.dtype)
    feature_gain = (gain * scale.reshape(())).to(dtype)
    x_operand, y_operand = (_scaled(side, narrow) for side in (x, y))
    for rows in tiles.chunks():
        t = tiles.t(rows)
        logit, pairs = tiles.logits(t), tiles.pairs(rows, t)
        w = lines[0].weights(kind, logit, rows, (pairs.rows, pairs.columns))
        if pairs.positives is not None:
            counts = pairs.positives, pairs.positives
            if kind.negates_positives:
                w -= lines[1].weights(kind, -logit, rows, counts)
            else:
                w += lines[1].weights(kind, logit, rows, counts)
        totals[0] += w.sum(dtype=totals.dtype)
        totals[1] += (w * t).sum(dtype=totals.dtype)
        operand = (w * enlarged).to(x.features.dtype) if narrow else w
        partners = torch.arange(rows.start, rows.stop, device=device) + block.offset
        inside = (partners >= 0) & (partners < n)
        partners = partners.clamp(0, n - 1)
        weight = torch.where(inside, positive_weight[rows], 0)
        totals[0] += weight.sum()
        totals[1] += torch.where(inside, weight * positive[rows], 0).sum()
        if wanted.key_bias:
            by_column += w.sum(0, dtype=by_column.dtype)
            by_column.index_add_(0, partners, weight)
        weight = weight[:, None].to(dtype)
        if wanted.x:
            part = _multiply(operand, y_operand, dtype) / enlarged
            part += weight * _normalized(y, partners, dtype)
            dx[rows] = _complete(part, x, rows, feature_gain, wanted.project, wanted.dtype_x)
        if wanted.y:
            dy += _multiply(operand.T, x_operand[rows], dtype) / enlarged
            # At most one row for each column: index_add_ has nothing to order.
            dy.index_add_(0, partners, weight * _normalized(x, rows, dtype))
    if wanted.y:
        dy = _complete(dy, y, slice(None), feature_gain, wanted.project, wanted.dtype_y)
    return dx, dy.to(wanted.dtype_y), totals * gain, by_column * gain


def _normalized(side: Side, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
    x = side.features[rows].to(dtype)
    return x if side.factor is None else x * side.factor[rows, None]


def _scaled(side: Side, narrow: bool) -> Tensor:
    """The operand of a product with weights: as wide as the weights."""
    if narrow and side.factor is None:
        return side.features
    scaled = _normalized(side, slice(None), accumulation_dtype(side.features))
    return scaled.to(side.features.dtype) if narrow else scaled


def _complete(
    g: Tensor, side: Side, rows: slice, gain: Tensor, project: bool, dtype: torch.dtype
) -> Tensor:
    """Gain, the normalisation's Jacobian `factor * (g - x^ <x^, g>)`, and the output's dtype."""
    if not project or side.factor is None:
        return (g * gain).to(dtype)
    f, x = side.factor[rows, None], side.features[rows]
    # A norm below 1e-12 was clamped: the features were divided by a constant.
    clamped = f >= 0.9999e12
    unit = x.to(g.dtype) * f
    g = torch.where(clamped, g, g - unit * (unit * g).sum(1, keepdim=True))
    g = g * (gain * f)
    # 1e12 times anything overflows fp16: there a zero row has no gradient, not an infinite one.
    return (torch.where(clamped, 0, g) if torch.float16 in (dtype, x.dtype) else g).to(dtype)


def sweep_and_weigh(
    block: Block, gain: Tensor, needs_x: bool, needs_y: bool, project: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.py`'s sweep_and_weigh. Plain PyTorch gains nothing by fusing: it sweeps, then weighs."""
    statistics = Statistics(*sweep(block, None, None, 0))
    m, n = block.sizes()
    state, positive, _ = statistics
    _, coefficients, weights = finish(state[:, :m], positive, block.scale, block.bias, block.kind)
    halves = torch.cat((coefficients, coefficients.new_ones(n))) / 2
    dtype = accumulation_dtype(block.x.features)
    wanted = Wanted(needs_x, needs_y, False, project, dtype, dtype)
    *gradients, _ = weigh(block, statistics, Upstream(halves, weights, gain), wanted)
    return state, positive, *gradients
