"""The engine in plain PyTorch: `sweep` and `weigh` of `ops.py` on any device.

It streams chunks of rows, so at most a chunk of the (M, N) matrix exists, in the forward and in
the backward. It is the engine where no compiled one can run, and the shortest text to learn the
algorithm from. `tile` makes a chunk of t; everything else is the loss's own `fold` and
`activation`, and where the sums go.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .epilogues import EPILOGUES, LOG2E, Softmax
from .ops import accumulation_dtype, state_dtype

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


class _Block:
    """A rectangular block of logits, of which chunks of rows are made on demand."""

    def __init__(
        self, x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None,
        scale: Tensor, bias: Tensor | None, offset: int, loss: str,
    ) -> None:  # fmt: skip
        self.x, self.y = x, y
        self.factor_x, self.factor_y = factor_x, factor_y
        self.dtype = accumulation_dtype(x)
        self.epilogue = EPILOGUES[loss]
        self.scale = scale.reshape(()).to(state_dtype(x.device)) * LOG2E
        self.bias = None if bias is None else bias.reshape(()).to(self.scale.dtype) * LOG2E
        self.offset = offset
        self.columns = torch.arange(y.shape[0], device=x.device)

    def chunks(self) -> Iterator[slice]:
        return _chunks(self.x.shape[0], self.y.shape[0])

    def tile(self, rows: slice) -> tuple[Tensor, Tensor]:
        """t (C, N) of a chunk of rows, and the columns' positives in it as a mask (C, N)."""
        t = _multiply(self.x[rows], self.y.T, self.dtype)
        if self.factor_x is not None:
            t *= self.factor_x[rows, None]
        if self.factor_y is not None:
            t *= self.factor_y
        positives = torch.arange(rows.start, rows.stop, device=t.device) + self.offset
        return t, positives[:, None] == self.columns

    def logits(self, t: Tensor) -> Tensor:
        """In log2 units."""
        logit = t * self.scale.to(self.dtype)
        return (
            logit
            if self.bias is None or not self.epilogue.uses_bias
            else logit + self.bias.to(logit.dtype)
        )


def _largest(logit: Tensor, dim: int) -> Tensor:
    """Reference of each line: its largest negative, or 0 where there is none."""
    largest = logit.amax(dim)
    return torch.where(largest == -torch.inf, 0, largest.ceil())


def sweep(
    x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None, scale: Tensor,
    bias: Tensor | None, bound: Tensor | None, offset: int, loss: str, keep: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.py`'s sweep. A reference for each line, so no bound is needed; nothing is kept."""
    if keep:
        raise ValueError(f"keep must be 0: the plain PyTorch engine keeps nothing, got {keep}")
    block = _Block(x, y, factor_x, factor_y, scale, bias, offset, loss)
    epilogue = block.epilogue
    m, n = x.shape[0], y.shape[0]
    state = torch.zeros((2, m + n), dtype=state_dtype(x.device), device=x.device)
    (row_reference, column_reference), (row_sum, column_sum) = (s.split([m, n]) for s in state)
    positive = torch.full((m,), torch.nan, dtype=state.dtype, device=x.device)
    for rows in block.chunks():
        t, is_positive = block.tile(rows)
        logit = block.logits(t)
        _note_positives(positive[rows], block, logit, t, rows.start + offset)
        if epilogue is Softmax:
            logit.masked_fill_(is_positive, -torch.inf)
            here = _largest(logit, 1)
            row_reference[rows] = here
            row_sum[rows] = epilogue.fold(logit, here[:, None]).sum(1)
            here = _largest(logit, 0)
            sums = epilogue.fold(logit, here).sum(0).to(state.dtype)
            merge(column_reference, column_sum, here.to(state.dtype), sums)
        else:
            negatives = epilogue.fold(logit, row_reference[rows, None]).masked_fill_(is_positive, 0)
            row_sum[rows] = negatives.sum(1, dtype=state.dtype)
            column_sum += negatives.sum(0)
    return state, positive, x.new_empty((0,), dtype=block.dtype)


def _note_positives(positive: Tensor, block: _Block, logit: Tensor, t: Tensor, offset: int) -> None:
    """The diagonal of a chunk that begins `offset` columns right of its first column."""
    if not -t.shape[0] < offset < t.shape[1]:
        return
    diagonal = t.diagonal(offset).to(positive.dtype)
    if not block.epilogue.uses_bias:
        # t as the rounded logits have it: a positive must tie with its duplicates among them.
        exact = logit.diagonal(offset).to(positive.dtype) / block.scale
        diagonal = torch.where(block.scale == 0, diagonal, exact)
    first = max(0, -offset)
    positive[first : first + len(diagonal)] = diagonal


def merge(reference: Tensor, sum: Tensor, other_reference: Tensor, other_sum: Tensor) -> None:
    """Adds other states to states, in place: the same merge serves chunks, ring steps and ranks."""
    reference_is_free = sum == 0
    other_is_free = other_sum == 0
    top = torch.maximum(reference, other_reference)
    top = torch.where(reference_is_free, other_reference, top)
    top = torch.where(other_is_free & ~reference_is_free, reference, top)
    mine = torch.where(reference_is_free, 0, sum * torch.exp2(reference - top))
    theirs = torch.where(other_is_free, 0, other_sum * torch.exp2(other_reference - top))
    sum.copy_(mine + theirs)
    reference.copy_(top)


def finish(
    state: Tensor, positive: Tensor, scale: Tensor, bias: Tensor | None, loss: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.py`'s finish: the loss's own, with each line's positive beside its state."""
    s = positive.repeat(state.shape[1] // positive.shape[0]) * scale.reshape(()).to(state.dtype)
    epilogue = EPILOGUES[loss]
    if bias is not None and epilogue.uses_bias:
        s = s + bias.reshape(()).to(s.dtype)
    return epilogue.finish(*state, s)


def weigh(
    x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None, scale: Tensor,
    bias: Tensor | None, state: Tensor, positive: Tensor, coefficients: Tensor,
    positive_weight: Tensor, gain: Tensor, kept: Tensor, offset: int, loss: str, needs_x: bool,
    needs_y: bool, project: bool, dtype_x: torch.dtype, dtype_y: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.py`'s weigh: the weights of a chunk, its sums, and two products with the features."""
    block = _Block(x, y, factor_x, factor_y, scale, bias, offset, loss)
    epilogue, dtype = block.epilogue, block.dtype
    m, n = x.shape[0], y.shape[0]
    a, b = coefficients.to(dtype).split([m, n])
    row_reference, column_reference = state[0].to(dtype).split([m, n])
    positive_weight = positive_weight.to(state.dtype)
    # A half-precision product takes the weights in the features' dtype. They are at most 2; fp16
    # would lose those below 6e-8 and blur those below 6e-5, so it takes them as large as it can.
    narrow = x.is_cuda and x.dtype != dtype
    enlarged = 2.0**13 if narrow and x.dtype == torch.float16 else 1.0
    dx = torch.empty((m if needs_x else 0, x.shape[1]), dtype=dtype_x, device=x.device)
    dy = torch.zeros((n if needs_y else 0, x.shape[1]), dtype=dtype, device=x.device)
    totals = torch.zeros((2,), dtype=state.dtype, device=x.device)
    gain = gain.reshape(()).to(state.dtype)
    feature_gain = (gain * scale.reshape(())).to(dtype)
    y_operand, x_operand = _scaled(y, factor_y, narrow), _scaled(x, factor_x, narrow)
    for rows in block.chunks():
        t, is_positive = block.tile(rows)
        logit = block.logits(t)
        if epilogue is Softmax:
            w = epilogue.activation(logit, row_reference[rows, None]) * a[rows, None]
            w += epilogue.activation(logit, column_reference) * b
        else:
            w = epilogue.activation(logit, row_reference[rows, None]) * (a[rows, None] + b)
        w.masked_fill_(is_positive, 0)
        totals[0] += w.sum(dtype=totals.dtype)
        totals[1] += (w * t).sum(dtype=totals.dtype)
        operand = (w * enlarged).to(x.dtype) if narrow else w
        partners = torch.arange(rows.start, rows.stop, device=x.device) + offset
        inside = (partners >= 0) & (partners < n)
        partners = partners.clamp(0, n - 1)
        weight = torch.where(inside, positive_weight[rows], 0)
        totals[0] += weight.sum()
        totals[1] += torch.where(inside, weight * positive[rows], 0).sum()
        weight = weight[:, None].to(dtype)
        if needs_x:
            part = _multiply(operand, y_operand, dtype) / enlarged
            part += weight * _normalized(y[partners], factor_y, partners, dtype)
            dx[rows] = _complete(part, x[rows], factor_x, rows, feature_gain, project, dtype_x)
        if needs_y:
            dy += _multiply(operand.T, x_operand[rows], dtype) / enlarged
            # At most one row for each column: index_add_ has nothing to order.
            dy.index_add_(0, partners, weight * _normalized(x[rows], factor_x, rows, dtype))
    if needs_y:
        dy = _complete(dy, y, factor_y, slice(None), feature_gain, project, dtype_y)
    return dx, dy.to(dtype_y), totals * gain


def _normalized(
    x: Tensor, factor: Tensor | None, rows: Tensor | slice, dtype: torch.dtype
) -> Tensor:
    return x.to(dtype) if factor is None else x.to(dtype) * factor[rows, None]


def _scaled(x: Tensor, factor: Tensor | None, narrow: bool) -> Tensor:
    """The operand of a product with weights: as wide as the weights."""
    if narrow and factor is None:
        return x
    dtype = accumulation_dtype(x)
    scaled = _normalized(x, factor, slice(None), dtype)
    return scaled.to(x.dtype) if narrow else scaled


def _complete(
    g: Tensor, x: Tensor, factor: Tensor | None, rows: slice, gain: Tensor, project: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gain, the normalisation's Jacobian `factor * (g - x^ <x^, g>)`, and the output's dtype."""
    if not project or factor is None:
        return (g * gain).to(dtype)
    f = factor[rows, None]
    # A norm below 1e-12 was clamped: the features were divided by a constant.
    clamped = f >= 0.9999e12
    unit = x.to(g.dtype) * f
    g = torch.where(clamped, g, g - unit * (unit * g).sum(1, keepdim=True))
    g = g * (gain * f)
    # 1e12 times anything overflows fp16: there a zero row has no gradient, not an infinite one.
    return (torch.where(clamped, 0, g) if torch.float16 in (dtype, x.dtype) else g).to(dtype)


def sweep_and_weigh(
    x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None, scale: Tensor,
    bias: Tensor | None, gain: Tensor, offset: int, loss: str, needs_x: bool, needs_y: bool,
    project: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.py`'s sweep_and_weigh. Plain PyTorch gains nothing by fusing: it sweeps, then weighs."""
    state, positive, kept = sweep(x, y, factor_x, factor_y, scale, bias, None, offset, loss, 0)
    m, n = x.shape[0], y.shape[0]
    _, coefficients, weights = finish(state[:, :m], positive, scale, bias, loss)
    halves = torch.cat((coefficients, coefficients.new_ones(n))) / 2
    dtype = accumulation_dtype(x)
    gradients = weigh(
        x, y, factor_x, factor_y, scale, bias, state, positive, halves, weights, gain, kept, offset,
        loss, needs_x, needs_y, project, dtype, dtype,
    )  # fmt: skip
    return state, positive, *gradients
