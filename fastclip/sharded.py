"""The loss of a batch spread over ranks, one-sided: each rank makes its block of rows only.

A rank sweeps `S[own rows, all columns]` once, for both directions: rows are complete there, columns
are partial sums that ranks add up. Half the work of a loss that makes own rows and own columns.
`visits.py` brings the columns, all at once or rank by rank; states and positives are O(B).

What the ranks' losses are multiplied with may differ from rank to rank: the weight of a pair uses
what its row's rank and its column's rank use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunked import merge
from .epilogues import EPILOGUES
from .function import Plan, cast, factor_of, operator, refuse_second_derivative, scalar_like
from .operands import accumulation_dtype, state_dtype
from .ops import rows_to_keep
from .shard import Shard
from .visits import Gathered, Ring


class Sharing(NamedTuple):
    """Which value a rank returns, and which gradients come back to it.

    The default is exact: after a mean over ranks, as DDP takes it, all gradients are those of one
    process on the whole batch. The others are open_clip's (`distributed.py` has the table).
    """

    whole_value: bool = False  # the loss of all pairs, else the share of the rank's own
    from_others: bool = True  # of other ranks' losses, too
    ring: bool = False  # columns come rank by rank


class _Context(NamedTuple):
    plan: Plan
    shard: Shard
    sharing: Sharing

    @property
    def columns(self) -> Gathered | Ring:
        return (Ring if self.sharing.ring else Gathered)(self.shard)

    @property
    def epilogue(self) -> Any:
        return EPILOGUES[self.plan.loss]

    def finish(self, state: Tensor, positive: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
        return operator("finish", self.plan)(
            state.contiguous(), positive, scale, bias, self.plan.loss
        )


def sharded_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, plan: Plan, shard: Shard,
    sharing: Sharing,
) -> Tensor:  # fmt: skip
    """The mean of the ranks' values is the mean over all pairs. x, y (b, D) are this rank's."""
    context = _Context(plan, shard, sharing)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, y, scale, bias)
    ):
        return _ShardedLoss.apply(x, y, scale, bias, context)
    return _sweep(context, _operands(context, x, y, scale, bias), keep=0).value


class _Operands(NamedTuple):
    """Of the operators, but for the columns, which `_visits` brings."""

    x: Tensor
    held: Tensor
    factor_x: Tensor | None
    held_factor: Tensor | None
    scale: Tensor
    bias: Tensor | None


def _operands(
    context: _Context, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None
) -> _Operands:
    plan = context.plan
    x, y = cast(x, plan.dtype), cast(y, plan.dtype)
    factors = (factor_of(x), factor_of(y)) if plan.normalize else (None, None)
    held = [None if t is None else context.columns.held(t) for t in (y, factors[1])]
    return _Operands(
        x, held[0], factors[0], held[1], scale, bias if context.epilogue.uses_bias else None
    )


def _visits(context: _Context, o: _Operands) -> Iterator[tuple[tuple[Any, ...], slice, int]]:
    """The operators' block of each visit, its columns, and its offset."""
    factors = None
    if o.held_factor is not None:
        factors = context.columns.visits(o.held_factor)
    for y, columns in context.columns.visits(o.held):
        factor = None if factors is None else next(factors)[0]
        offset = context.shard.start - columns.start
        yield (o.x, y, o.factor_x, factor, o.scale, o.bias), columns, offset


def _bound(context: _Context, x: Tensor, y: Tensor) -> Tensor | None:
    """Of |t| on all ranks: with it they take one reference, and columns' sums add up as they are.
    A NaN or infinity in it makes every rank take references of its own."""
    if not context.epilogue.needs_state:
        return None
    if context.plan.normalize:
        return torch.ones((), dtype=state_dtype(x.device), device=x.device)
    dtype = accumulation_dtype(x)
    longest = [torch.linalg.vector_norm(t, dim=1, dtype=dtype).amax() for t in (x, y)]
    return context.shard.max(torch.stack(longest)).prod().to(state_dtype(x.device))


def merge_columns(state: Tensor, shard: Shard) -> Tensor:
    """States (2, B) of the ranks' blocks to those of all their pairs.

    As a rule all references are one number and this adds sums; where a rank had to take references
    of its own, powers of two relate them.
    """
    reference, sums = state
    absent = sums == 0
    top = shard.max(torch.where(absent, -torch.inf, reference))
    top = torch.where(top == -torch.inf, 0, top)
    return torch.stack((top, shard.sum(torch.where(absent, 0, sums * (reference - top).exp2()))))


class _Swept(NamedTuple):
    value: Tensor
    state: Tensor  # (2, b + B): own rows, then all columns
    positive: Tensor  # (b)
    kept: Tensor
    coefficients: Tensor  # (b + B)
    of_rows: Tensor  # (b): the positives' weights, as their rows have them
    of_columns: Tensor  # (b): as their columns have them


def _sweep(context: _Context, o: _Operands, keep: int) -> _Swept:
    plan, shard = context.plan, context.shard
    b = o.x.shape[0]
    bound = _bound(context, o.x, o.held)
    rows, positive, kept = None, None, None
    columns = o.x.new_empty((2, shard.batch), dtype=state_dtype(o.x.device))
    for block, where, offset in _visits(context, o):
        state, here, kept = operator("sweep", plan)(*block, bound, offset, plan.loss, keep)
        columns[:, where] = state[:, b:]
        if rows is None:  # own columns come first, or with all others: here are the positives
            rows, positive = state[:, :b].clone(), here
        else:
            merge(*rows, *state[:, :b])
    if not context.epilogue.needs_state:
        losses, coefficients, weights = context.finish(rows, positive, o.scale, o.bias)
        # A sum over pairs: a rank's share are its rows, its columns belong to the others' rows.
        coefficients = torch.cat((coefficients, coefficients.new_zeros(shard.batch)))
        value = _value(context, losses.sum())
        state = torch.cat((rows, columns), 1)
        return _Swept(value, state, positive, kept, coefficients, weights, weights * 0)
    state = torch.cat((rows, merge_columns(columns, shard)), 1)
    positives = torch.cat((positive, shard.gather(positive)))
    losses, coefficients, weights = context.finish(state, positives, o.scale, o.bias)
    own = (losses[:b].sum() + losses[b:][shard.mine].sum()) / 2
    # A pair counts half its row's and half its column's loss.
    return _Swept(
        _value(context, own), state, positive, kept, coefficients / 2, weights[:b] / 2,
        weights[b:][shard.mine] / 2,
    )  # fmt: skip


def _value(context: _Context, own: Tensor) -> Tensor:
    """own: the sum of this rank's pairs' losses."""
    shard = context.shard
    dtype = torch.float64 if context.plan.dtype == torch.float64 else torch.float32
    if context.sharing.whole_value:
        return (shard.sum(own.reshape(1)).reshape(()) / shard.batch).to(dtype)
    return (own * (shard.world_size / shard.batch)).to(dtype)


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, context: _Context
    ) -> Tensor:
        ctx.context, ctx.dtypes = context, (x.dtype, y.dtype)
        operands = _operands(context, x, y, scale, bias)
        ctx.in_one_go = _makes_gradients_at_once(context, x, y)
        if ctx.in_one_go:
            value, *gradients = _sweep_and_weigh(context, operands, ctx.needs_input_grad[0])
            ctx.save_for_backward(x, y, scale, bias, *gradients)
            return value
        keep = 0
        if context.plan.engine != "torch" and not context.sharing.ring:
            itemsize = accumulation_dtype(operands.x).itemsize
            budget = context.plan.memory_budget
            keep = rows_to_keep(x.shape[0], context.shard.batch, itemsize, budget)
        swept = _sweep(context, operands, keep)
        ctx.save_for_backward(x, y, scale, bias, *operands, *swept[1:])
        return swept.value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = (_scale if ctx.in_one_go else _weigh)(ctx, g)
        if torch.is_grad_enabled():
            gradients = refuse_second_derivative(gradients, g, *ctx.saved_tensors[:3])
        return *gradients, None


def _makes_gradients_at_once(context: _Context, x: Tensor, y: Tensor) -> bool:
    """Where weights need no state the forward makes gradients for upstream 1, a sweep less. They
    wait in fp32, O(B D), and columns are not to visit a second time."""
    wide = accumulation_dtype(x)
    return (
        not context.epilogue.needs_state
        and not context.sharing.ring
        and (x.device.type == "cuda" or x.dtype == y.dtype == wide == context.plan.dtype)
    )


def _sweep_and_weigh(
    context: _Context, o: _Operands, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's value; dx, dy of all columns, dbias and dscale, for upstream 1."""
    plan, shard = context.plan, context.shard
    dtype = state_dtype(o.x.device)
    share = torch.full((), shard.world_size / shard.batch, dtype=dtype, device=o.x.device)
    ((block, _, offset),) = _visits(context, o)
    state, positive, *gradients = operator("sweep_and_weigh", plan)(
        *block, share, offset, plan.loss, needs_x, shard.needs_y, plan.normalize
    )
    losses, _, _ = context.finish(state[:, : o.x.shape[0]], positive, o.scale, o.bias)
    return _value(context, losses.sum()), *gradients


def _scale(ctx: Any, g: Tensor) -> list[Tensor | None]:
    _, _, scale, bias, dx, dy, dbias_dscale = ctx.saved_tensors
    needs_x, needs_y, needs_scale, needs_bias = ctx.needs_input_grad[:4]
    if ctx.context.shard.needs_y:
        dy = ctx.context.shard.scatter_sum(dy * g)
    dbias, dscale = (dbias_dscale * g).unbind()
    return [
        cast(dx * g, ctx.dtypes[0]) if needs_x else None,
        cast(dy, ctx.dtypes[1]) if needs_y else None,
        scalar_like(dscale, scale) if needs_scale else None,
        scalar_like(dbias, bias) if needs_bias else None,
    ]


class _Upstream(NamedTuple):
    """What a rank's gradients are multiplied with.

    Weights keep order 1, whatever the upstream gradients: a common factor, `gain`, goes outside.
    """

    gain: Tensor
    of_rows: Tensor | float  # (b)
    of_columns: Tensor | float  # (B)
    afterwards: Tensor | float  # both towers' gradients


def _upstream(context: _Context, g: Tensor, dtype: torch.dtype) -> _Upstream:
    shard, sharing = context.shard, context.sharing
    if sharing.whole_value:
        # The gradient of the loss of all pairs, for what all ranks make of it, or this one alone.
        gain = torch.full((), 1 / shard.batch, dtype=dtype, device=g.device)
        every = shard.sum(g.reshape(1).clone()).reshape(()) if sharing.from_others else g
        return _Upstream(gain, 1.0, 1.0, every)
    upstreams = shard.gather_scalar(g).to(dtype)
    largest = upstreams.abs().amax()
    relative = shard.by_pair(upstreams / torch.where(largest > 0, largest, 1))
    share = shard.world_size / shard.batch
    return _Upstream(largest * share, relative[shard.mine], relative, 1.0)


def _weigh(ctx: Any, g: Tensor) -> list[Tensor | None]:
    context = ctx.context
    shard, sharing = context.shard, context.sharing
    _, _, _, bias, *saved = ctx.saved_tensors
    operands, saved = _Operands(*saved[:6]), saved[6:]
    state, coefficients = saved[0], saved[3]
    upstream = _upstream(context, g, state.dtype)
    a, b = coefficients.split([operands.x.shape[0], shard.batch])
    a, b = a * upstream.of_rows, b * upstream.of_columns
    of_rows, of_columns = saved[4] * upstream.of_rows, saved[5] * upstream.of_rows
    needs_x, needs_y, needs_scale, needs_bias = ctx.needs_input_grad[:4]
    work = _Weighing(context, operands, *saved[:3], upstream.gain)
    if sharing.from_others or sharing.whole_value:
        dx, dy, totals = work.run(a, b, of_rows + of_columns, (needs_x, shard.needs_y))
    else:
        # Each tower as the anchor of its own rank's loss alone: rows for x, columns for y.
        dx, _, of_x = work.run(a, b * 0, of_rows, (needs_x, False))
        _, dy, of_y = work.run(a * 0, b, of_columns, (False, shard.needs_y))
        totals = of_x + of_y
    if sharing.whole_value:
        totals = shard.sum(totals) * g
    if sharing.whole_value:
        dx, dy = dx * upstream.afterwards, dy * upstream.afterwards
    own_factor = operands.held_factor
    if own_factor is not None and len(own_factor) == shard.batch:
        own_factor = own_factor[shard.mine]
    return [
        _to_features(dx, operands.factor_x, ctx.dtypes[0]) if needs_x else None,
        _to_features(dy, own_factor, ctx.dtypes[1]) if needs_y else None,
        scalar_like(totals[1], operands.scale) if needs_scale else None,
        scalar_like(totals[0], bias) if needs_bias and context.epilogue.uses_bias
        else torch.zeros_like(bias) if needs_bias else None,
    ]  # fmt: skip


def _to_features(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In the features' dtype. A row shorter than epsilon was divided by 1e-12: in fp16 it has no
    gradient instead of an infinite one, as in one process."""
    if dtype == torch.float16 and factor is not None:
        gradient = gradient.masked_fill(factor[:, None] >= 0.9999e12, 0)
    return cast(gradient, dtype)


class _Weighing(NamedTuple):
    """The second sweep over all visits."""

    context: _Context
    operands: _Operands
    state: Tensor
    positive: Tensor
    kept: Tensor
    gain: Tensor

    def run(
        self, a: Tensor, b: Tensor, positive_weight: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx and own rows of dy, in fp32 at least; this rank's part of dbias and dscale."""
        context, o = self.context, self.operands
        plan, rows = context.plan, o.x.shape[0]
        dtype = accumulation_dtype(o.x)
        dx, totals = o.x.new_zeros(o.x.shape if needs[0] else (0,), dtype=dtype), []

        def parts() -> Iterator[Tensor]:
            for block, where, offset in _visits(context, o):
                state = torch.cat((self.state[:, :rows], self.state[:, rows:][:, where]), 1)
                more, dy, sums = operator("weigh", plan)(
                    *block, state, self.positive, torch.cat((a, b[where])), positive_weight,
                    self.gain, self.kept, offset, plan.loss, *needs, plan.normalize, dtype, dtype,
                )  # fmt: skip
                if needs[0]:
                    dx.add_(more)
                totals.append(sums)
                yield dy

        # Every visit has to be made, whether or not it leaves something to take home.
        dy = context.columns.home(parts()) if needs[1] else [*parts()][-1]
        return dx, dy, torch.stack(totals).sum(0)
