"""The loss of a batch spread over ranks, one-sided: each rank makes its block of rows only.

A rank sweeps `S[own rows, all columns]` once, for both directions, half the work of a loss that
makes own rows and own columns; `block_row.py` has the sweeps, this file makes them differentiable.

What the ranks' losses are multiplied with may differ from rank to rank: the weight of a pair uses
what its row's rank and its column's rank use.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .block_row import Context, Operands, Sharing, Swept, Weighing, block, sweep, visits
from .function import Plan, cast, differentiates, refuse_second_derivative, scalar_like
from .operands import accumulation_dtype, state_dtype
from .shard import Shard


def sharded_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, plan: Plan, shard: Shard,
    sharing: Sharing,
) -> Tensor:  # fmt: skip
    """The mean of the ranks' values is the mean over all pairs. x, y (b, D) are this rank's."""
    context = Context(plan, shard, sharing)
    if differentiates(x, y, scale, bias):
        return _ShardedLoss.apply(x, y, scale, bias, context)
    own, _ = sweep(context, Operands.of(context, x, y, scale, bias), budget=0)
    return _value(context, own)


def _value(context: Context, own: Tensor) -> Tensor:
    """own: the sum of this rank's pairs' losses."""
    shard = context.shard
    dtype = torch.float64 if context.plan.dtype == torch.float64 else torch.float32
    if context.sharing.whole_value:
        return (shard.sum(own.reshape(1)).reshape(()) / shard.batch).to(dtype)
    return (own * (shard.world_size / shard.batch)).to(dtype)


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, context: Context
    ) -> Tensor:
        ctx.context, ctx.dtypes = context, (x.dtype, y.dtype)
        operands = Operands.of(context, x, y, scale, bias)
        ctx.in_one_go = _makes_gradients_at_once(context, x, y)
        if ctx.in_one_go:
            value, *gradients = _sweep_and_weigh(context, operands, ctx.needs_input_grad[0])
            ctx.save_for_backward(x, y, scale, bias, *gradients)
            return value
        # What is kept serves a second sweep over the very same blocks.
        budget = context.plan.memory_budget if context.shard.all_live else 0
        own, swept = sweep(context, operands, budget)
        ctx.save_for_backward(x, y, scale, bias, *operands, *swept[:-1], *swept.kept)
        return _value(context, own)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = (_scale if ctx.in_one_go else _weigh)(ctx, g)
        if torch.is_grad_enabled():
            gradients = refuse_second_derivative(gradients, g, *ctx.saved_tensors[:3])
        return *gradients, None


def _makes_gradients_at_once(context: Context, x: Tensor, y: Tensor) -> bool:
    """Where weights need no state the forward makes gradients for upstream 1, a sweep less. They
    wait in fp32, O(B D), and columns are not to visit a second time."""
    wide = accumulation_dtype(x)
    return (
        context.kind.is_linear
        and not context.sharing.ring
        and context.shard.all_live
        and (x.device.type == "cuda" or x.dtype == y.dtype == wide == context.plan.dtype)
    )


def _sweep_and_weigh(
    context: Context, o: Operands, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's value; dx, dy of all columns, dbias and dscale, for upstream 1."""
    plan, shard = context.plan, context.shard
    dtype = state_dtype(o.x.device)
    share = torch.full((), shard.world_size / shard.batch, dtype=dtype, device=o.x.device)
    (every,) = visits(context, o)
    state, positive, *gradients = ops.sweep_and_weigh(
        plan.engine, block(context, o, slice(None), every.y, every.factor, shard.start), share,
        needs_x, shard.needs_y, plan.normalize,
    )  # fmt: skip
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


def _upstream(context: Context, g: Tensor, dtype: torch.dtype) -> _Upstream:
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
    operands, saved = Operands(*saved[: len(Operands._fields)]), saved[len(Operands._fields) :]
    single = len(Swept._fields) - 1
    swept = Swept(*saved[:single], tuple(saved[single:]))
    upstream = _upstream(context, g, swept.state.dtype)
    a, b = swept.coefficients.split([shard.rows, shard.batch])
    a, b = a * upstream.of_rows, b * upstream.of_columns
    of_rows, of_columns = swept.of_rows * upstream.of_rows, swept.of_columns * upstream.of_rows
    needs_x, needs_y, needs_scale, needs_bias = ctx.needs_input_grad[:4]
    work = Weighing(context, operands, swept, upstream.gain)
    if sharing.from_others or sharing.whole_value:
        dx, dy, totals = work.run(a, b, of_rows + of_columns, (needs_x, shard.needs_y))
    else:
        # Each tower as the anchor of its own rank's loss alone: rows for x, columns for y.
        dx, _, of_x = work.run(a, b * 0, of_rows, (needs_x, False))
        _, dy, of_y = work.run(a * 0, b, of_columns, (False, shard.needs_y))
        totals = of_x + of_y
    if sharing.whole_value:
        totals = shard.sum(totals) * g
        dx, dy = dx * upstream.afterwards, dy * upstream.afterwards
    own_factor = operands.held_factor
    if own_factor is not None:
        own_factor = context.columns.own(own_factor)
    return [
        _to_features(dx, operands.factor_x, ctx.dtypes[0]) if needs_x else None,
        _to_features(dy, own_factor, ctx.dtypes[1]) if needs_y else None,
        scalar_like(totals[1], operands.scale) if needs_scale else None,
        scalar_like(totals[0], bias) if needs_bias and operands.bias is not None
        else torch.zeros_like(bias) if needs_bias else None,
    ]  # fmt: skip


def _to_features(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In the features' dtype. A row shorter than epsilon was divided by 1e-12: in fp16 it has no
    gradient instead of an infinite one, as in one process."""
    if dtype == torch.float16 and factor is not None:
        gradient = gradient.masked_fill(factor[:, None] >= 0.9999e12, 0)
    return cast(gradient, dtype)
