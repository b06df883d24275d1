"""The engine in plain PyTorch: the operators of `operators.py` on any device.

It streams chunks of rows, so that no more than one chunk of the (M, N) matrix exists, in the
forward and in the backward. It runs where no compiled engine can, and it is the shortest text to
learn the algorithm from. `_ChunkedBlock` makes a chunk of t and its masks of pairs; the kind's
`fold` and `activation` turn it into sums and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..kinds import LOG2E, Kind, Softmax, kind_of
from .block import Block, Side, SweepResults, Upstream, Wanted
from .dtypes import accumulation_dtype, state_dtype
from .tiny_norms import CLAMPED

# Elements of a chunk: 8 MiB in fp32. Up to four such tensors exist at a time, six with targets.
CHUNK = 1 << 21


def _multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a @ b of operands in their own dtype, accumulated and returned in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _chunks(m: int, n: int) -> Iterator[slice]:
    rows = max(1, CHUNK // n)
    return (slice(start, min(start + rows, m)) for start in range(0, m, rows))


class _ChunkedBlock:
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
        t = _multiply(x[rows], y.T, self.dtype)
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

    def pairs(self, rows: slice, t: Tensor, targets: Tensor | None) -> _Pairs:
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
        t = targets if self.block.guided else t
        # A pair whose t is NaN counts, so that the results of its line become NaN.
        return _Pairs(
            negatives & ~(t > x.threshold[rows, None]), negatives & ~(t > y.threshold), positives
        )


class _Pairs(NamedTuple):
    """Masks of the pairs of a chunk, (C, N)."""

    rows: Tensor  # negatives of their rows
    columns: Tensor  # negatives of their columns
    positives: Tensor | None  # positives by id


def _largest(logit: Tensor, dim: int) -> Tensor:
    """The shift of each line: its largest logit, rounded up, or 0 for a line without pairs."""
    largest = logit.amax(dim)
    return torch.where(largest == -torch.inf, 0, largest.ceil())


def _add(
    kind: type[Kind], logit: Tensor, counts: Tensor, dim: int, shift: Tensor, sums: Tensor,
    levels: Tensor | None = None,
) -> None:  # fmt: skip
    """Adds a chunk's pairs to the states of its rows (dim 1) or columns (dim 0), whose levels are
    given in a kind with levels."""
    if levels is not None:
        level = levels.to(logit.dtype).unsqueeze(dim)
        for total, function in ((shift, kind.activation), (sums, kind.fold)):
            values = function(logit, level).masked_fill(~counts, 0)
            total += values.sum(dim, dtype=total.dtype)
    elif kind.has_shift:
        logit = torch.where(counts, logit, -torch.inf)
        here = _largest(logit, dim)
        found = kind.fold(logit, here.unsqueeze(dim)).sum(dim)
        merge(shift, sums, here.to(shift.dtype), found.to(sums.dtype))
    else:
        folded = kind.fold(logit, shift.new_zeros(())).masked_fill(~counts, 0)
        sums += folded.sum(dim, dtype=sums.dtype)


def _add_expectation(logit: Tensor, t: Tensor, dim: int, shift: Tensor, sums: Tensor) -> None:
    """Adds a chunk's weights by a teacher, and their sum with t, to the states of its lines."""
    here = _largest(logit, dim)
    e = Softmax.fold(logit, here.unsqueeze(dim))
    found = torch.stack((e.sum(dim), (e * t).sum(dim)))
    merge(shift, sums, here.to(shift.dtype), found.to(sums.dtype))


def sweep(
    block: Block, bound: Tensor | None, occupied: Tensor | None, levels: Tensor | None, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `sweep`. Each line has a shift of its own, so bound and occupied are not needed.
    Nothing is kept."""
    if keep:
        raise ValueError(f"keep must be 0: the plain PyTorch engine keeps nothing, got {keep}")
    chunked, kind = _ChunkedBlock(block), kind_of(block.kind)
    x, (m, n) = block.x.features, block.sizes()
    state = torch.zeros((block.state_rows(), m + n), dtype=state_dtype(x.device), device=x.device)
    positive = torch.full((m,), torch.nan, dtype=state.dtype, device=x.device)
    sign = -1 if kind.negates_positives else 1
    of_rows, of_columns = (None, None) if levels is None else levels.split([m, n])
    for rows in chunked.chunks():
        t, targets = chunked.t(rows), chunked.targets(rows)
        logit, pairs = chunked.logits(t), chunked.pairs(rows, t, targets)
        _note_positives(positive[rows], chunked, t, rows.start + block.offset)
        by_row, by_column = state[:, :m][:, rows], state[:, m:]
        here = None if of_rows is None else of_rows[rows]
        _add(kind, logit, pairs.rows, 1, *by_row[:2], here)
        _add(kind, logit, pairs.columns, 0, *by_column[:2], of_columns)
        if pairs.positives is not None:
            _add(kind, sign * logit, pairs.positives, 1, *by_row[2:4])
            _add(kind, sign * logit, pairs.positives, 0, *by_column[2:4])
        if block.has_teacher():
            for dim, lines in ((1, by_row), (0, by_column)):
                _add_expectation(chunked.teacher_logits(targets), t, dim, lines[-3], lines[-2:])
    return state, positive, x.new_empty((0,), dtype=chunked.dtype)


def _note_positives(positive: Tensor, chunked: _ChunkedBlock, t: Tensor, offset: int) -> None:
    """Stores t of the chunk's own positives, its diagonal at `offset`."""
    if not -t.shape[0] < offset < t.shape[1]:
        return
    diagonal = t.diagonal(offset)
    if chunked.kind.has_shift:
        # A duplicate of the positive must have exactly its logit. The duplicates' logits are
        # rounded, so t is computed from the positive's rounded logit.
        exact = (diagonal * chunked.scale.to(t.dtype)).to(positive.dtype) / chunked.scale
        diagonal = torch.where(chunked.scale == 0, diagonal.to(positive.dtype), exact)
    first = max(0, -offset)
    positive[first : first + len(diagonal)] = diagonal.to(positive.dtype)


def merge(shift: Tensor, sum: Tensor, other_shift: Tensor, other_sum: Tensor) -> None:
    """Merges a second set of states into the first, in place. A line may have several sums relative
    to its shift, (K, L); the first says if it has pairs. It serves chunks of rows, and the
    visits of a ring. States of different ranks are merged by all-reduce, with the same arithmetic
    (`distributed/block_row.merge_columns`)."""
    shift_is_free, other_is_free = (t.reshape(-1, len(shift))[0] == 0 for t in (sum, other_sum))
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
    """The operator `finish`: calls the kind's `finish` with the state of each line and the logit
    of its own positive."""
    s = positive.repeat(state.shape[1] // positive.shape[0]) * scale.reshape(()).to(state.dtype)
    if bias is not None and not kind_of(kind).has_shift:
        s = s + bias.reshape(()).to(s.dtype)
    return kind_of(kind).finish(*state, s)


class _Lines(NamedTuple):
    """The shifts, or levels, and the coefficients of lines that weights are computed from."""

    rows: tuple[Tensor, Tensor]  # shifts and coefficients (M)
    columns: tuple[Tensor, Tensor]  # (N)

    @classmethod
    def of(cls, shift: Tensor, coefficients: Tensor, m: int) -> _Lines:
        return cls((shift[:m], coefficients[:m]), (shift[m:], coefficients[m:]))

    def weights(
        self, kind: type[Kind], logit: Tensor, rows: slice, counts: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The weights of a chunk's pairs. counts: masks of the pairs that count for their rows and
        for their columns."""
        (row_shift, a), (column_shift, b) = self
        row_shift, a = row_shift[rows, None], a[rows, None]
        # Masks apply after the product, since pairs that do not count may exceed the shift by far.
        if kind.is_relative():
            w = (kind.activation(logit, row_shift) * a).masked_fill_(~counts[0], 0)
            w += (kind.activation(logit, column_shift) * b).masked_fill_(~counts[1], 0)
            return w
        activation = kind.activation(logit, row_shift.new_zeros(()))
        if counts[0] is counts[1]:
            return (activation * (a + b)).masked_fill_(~counts[0], 0)
        w = (activation * a).masked_fill_(~counts[0], 0)
        return w.add_((activation * b).masked_fill_(~counts[1], 0))


def weigh(
    block: Block, statistics: SweepResults, upstream: Upstream, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator `weigh`: a chunk's weights, their sums, and two products with the features."""
    chunked, kind = _ChunkedBlock(block), kind_of(block.kind)
    dtype, (m, n) = chunked.dtype, block.sizes()
    x, y, scale = block.x, block.y, block.scale
    state, positive, _ = statistics
    shifts = state[: len(state) // 2 * 2 : 2].to(dtype)
    coefficients = upstream.coefficients.reshape(-1, m + n).to(dtype)
    lines = [_Lines.of(*both, m) for both in zip(shifts, coefficients, strict=True)]
    positive_weight = upstream.positive_weight.to(state.dtype)
    # A half-precision product takes the weights in the features' dtype. Weights are at most 2. fp16
    # would lose those below 6e-8 and blur those below 6e-5, so in fp16 they are multiplied by 2^13.
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
    every = torch.ones((), dtype=torch.bool, device=device)
    for rows in chunked.chunks():
        t, targets = chunked.t(rows), chunked.targets(rows)
        logit, pairs = chunked.logits(t), chunked.pairs(rows, t, targets)
        w = lines[0].weights(kind, logit, rows, (pairs.rows, pairs.columns))
        if pairs.positives is not None:
            counts = pairs.positives, pairs.positives
            if kind.negates_positives:
                w -= lines[1].weights(kind, -logit, rows, counts)
            else:
                w += lines[1].weights(kind, logit, rows, counts)
        if block.has_teacher():
            w += lines[-1].weights(Softmax, chunked.teacher_logits(targets), rows, (every, every))
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
            product = _multiply(operand, y_operand, dtype) / enlarged
            product += weight * _normalized(y, partners, dtype)
            dx[rows] = _complete(product, x, rows, feature_gain, wanted.project, wanted.dtype_x)
        if wanted.y:
            dy += _multiply(operand.T, x_operand[rows], dtype) / enlarged
            # The order in which index_add_ adds does not matter: a column gets at most one term
            # that is not zero, since rows without an own positive add zeros.
            dy.index_add_(0, partners, weight * _normalized(x, rows, dtype))
    if wanted.y:
        dy = _complete(dy, y, slice(None), feature_gain, wanted.project, wanted.dtype_y)
    return dx, dy.to(wanted.dtype_y), totals * gain, by_column * gain


def _normalized(side: Side, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
    x = side.features[rows].to(dtype)
    return x if side.factor is None else x * side.factor[rows, None]


def _scaled(side: Side, narrow: bool) -> Tensor:
    """The operand of a product with weights, in the weights' dtype."""
    if narrow and side.factor is None:
        return side.features
    scaled = _normalized(side, slice(None), accumulation_dtype(side.features))
    return scaled.to(side.features.dtype) if narrow else scaled


def _complete(
    g: Tensor, side: Side, rows: slice, gain: Tensor, project: bool, dtype: torch.dtype
) -> Tensor:
    """Applies the gain and the normalisation's Jacobian `factor * (g - x^ <x^, g>)`, and casts."""
    if not project or side.factor is None:
        return (g * gain).to(dtype)
    f, x = side.factor[rows, None], side.features[rows]
    clamped = f >= CLAMPED
    unit = x.to(g.dtype) * f
    g = torch.where(clamped, g, g - unit * (unit * g).sum(1, keepdim=True))
    g = g * (gain * f)
    # 1e12 times anything overflows fp16, which gets 0 for a zero row instead of infinity.
    return (torch.where(clamped, 0, g) if torch.float16 in (dtype, x.dtype) else g).to(dtype)


def sweep_and_weigh(
    block: Block, gain: Tensor, needs_x: bool, needs_y: bool, project: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator `sweep_and_weigh`: plain PyTorch gains nothing by fusing the two."""
    statistics = SweepResults(*sweep(block, None, None, None, 0))
    m, n = block.sizes()
    state, positive, _ = statistics
    _, coefficients, weights = finish(state[:, :m], positive, block.scale, block.bias, block.kind)
    halves = torch.cat((coefficients, coefficients.new_ones(n))) / 2
    dtype = accumulation_dtype(block.x.features)
    wanted = Wanted(needs_x, needs_y, False, project, dtype, dtype)
    *gradients, _ = weigh(block, statistics, Upstream(halves, weights, gain), wanted)
    return state, positive, *gradients
