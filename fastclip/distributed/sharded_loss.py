"""The differentiable loss of a batch that is spread over ranks.

A rank sweeps `S[own rows, all columns]` once for both directions: half the work of a loss that
computes own rows and own columns. `block_row.py` has the sweeps.

Ranks may scale their losses differently: the weight of a pair uses the upstream gradients of its
row's rank and of its column's rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine import operators
from ..engine.autograd import (
    bias_of,
    cast,
    differentiates,
    refuse_second_derivative,
    scalar_like,
    side_of,
)
from ..engine.block import Block, Upstream
from ..engine.dtypes import accumulation_dtype, state_dtype
from ..engine.fused_loss import LossInputs, LossOptions
from ..kinds import Kind, kind_of
from .block_row import TENSOR_COUNT, BlockRow, RowWeighing, Swept, merge_columns, to_features
from .block_row import sweep as sweep_row
from .exchange import Gathered, Ring
from .gradient_mode import GradientMode
from .shard import Shard


class LossTask(NamedTuple):
    """The options of a call, this rank's shard, and open_clip's mode."""

    options: LossOptions
    shard: Shard
    mode: GradientMode

    @property
    def kind(self) -> type[Kind]:
        return kind_of(self.options.kind)

    @property
    def pairs(self) -> slice:
        """This rank's live pairs, whose losses its value sums."""
        return self.shard.live[self.shard.rank]

    @property
    def columns(self) -> Gathered | Ring:
        return (Ring if self.mode.ring else Gathered)(self.shard)

    def own(self, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> Block:
        """The block of own rows and own columns."""
        options = self.options
        sides = (side_of(t, options.dtype, options.normalize) for t in (x, y))
        return Block(*sides, scale, bias_of(bias, options.kind), kind=options.kind)

    def row(self, own: Block) -> BlockRow:
        return BlockRow.of(self.options.engine, self.columns, self.options.normalize, own)

    def finish(self, row: BlockRow, state: Tensor, positive: Tensor) -> tuple[Tensor, ...]:
        """The losses, coefficients and positives' weights of lines."""
        if state.shape[1] == 0:
            return (state.new_zeros(0),) * 3
        block = row.block
        return operators.finish(
            row.engine, state.contiguous(), positive, block.scale, block.bias, block.kind
        )


def sharded_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, options: LossOptions, shard: Shard,
    mode: GradientMode,
) -> Tensor:  # fmt: skip
    """This rank's value for its x, y (b, D). The mean over ranks is the mean over all pairs."""
    task = LossTask(options, shard, mode)
    if differentiates(x, y, scale, bias):
        return _ShardedLoss.apply(x, y, scale, bias, task)
    return value_alone(task, task.row(task.own(x, y, scale, bias)))


def _value(task: LossTask, own: Tensor) -> Tensor:
    """The value of a rank. own: the sum of the losses of its pairs."""
    shard = task.shard
    dtype = torch.float64 if task.options.dtype == torch.float64 else torch.float32
    if task.mode.whole_value:
        return (shard.sum(own.reshape(1)).reshape(()) / shard.batch).to(dtype)
    return (own * (shard.world_size / shard.batch)).to(dtype)


class _WeightFactors(NamedTuple):
    """The factors of weights on a rank with b pairs."""

    coefficients: Tensor  # (b + B)
    of_rows: Tensor  # (b): the positives' weights from their rows' losses
    of_columns: Tensor  # (b): the positives' weights from their columns' losses


def sweep(task: LossTask, row: BlockRow, budget: int) -> tuple[Tensor, Swept, _WeightFactors]:
    """Returns the sum of the losses of this rank's pairs, and the input of the second sweep."""
    shard, pairs, m = task.shard, task.pairs, task.shard.rows
    if not task.kind.has_shift:
        # The weights of a row do not depend on other rows.
        swept = sweep_row(row, pairs, budget)
        losses, coefficients, weights = task.finish(row, swept.state[:, :m], swept.positive)
        # The loss is a sum over pairs: a rank adds its rows, the other ranks add its columns.
        coefficients = torch.cat((coefficients, coefficients.new_zeros(shard.batch)))
        return losses[pairs].sum(), swept, _WeightFactors(coefficients, weights, weights * 0)
    # The weights of a row depend on other rows through the states of columns.
    swept = sweep_row(row, slice(0, m), budget)
    columns = swept.state[:, m:]
    columns.copy_(merge_columns(columns, task.kind, shard))
    # Scale and own positives of a column are those of its rank, which has its coefficient.
    state = torch.cat((swept.state[:, :m], columns[:, shard.mine]), 1)
    losses, coefficients, weights = task.finish(row, state, torch.cat((swept.positive,) * 2))
    own = (losses[:m][pairs].sum() + losses[m:][pairs].sum()) / 2
    coefficients = torch.cat((coefficients[:m], shard.gather(coefficients[m:])))
    # The loss of a pair is half its row's plus half its column's.
    return own, swept, _WeightFactors(coefficients / 2, weights[:m] / 2, weights[m:] / 2)


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, task: LossTask
    ) -> Tensor:
        row = task.row(task.own(x, y, scale, bias))
        value, found = forward(task, row, x, y, ctx.needs_input_grad[0])
        ctx.task, ctx.row = task, row.without_tensors()
        of_row = (None,) * TENSOR_COUNT if makes_gradients_at_once(task, x, y) else row.tensors
        ctx.save_for_backward(x, y, scale, bias, *of_row, *found)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        inputs, saved = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        row, found = ctx.row.with_tensors(saved[:TENSOR_COUNT]), saved[TENSOR_COUNT:]
        with torch.no_grad():
            gradients = backward(ctx.task, row, inputs, found, ctx.needs_input_grad, g)
        if torch.is_grad_enabled():
            gradients = refuse_second_derivative(gradients, g, *inputs[:3])
        return *gradients, None


def value_alone(task: LossTask, row: BlockRow) -> Tensor:
    """This rank's value, without a backward."""
    own, *_ = sweep(task, row, budget=0)
    return _value(task, own)


def forward(
    task: LossTask, row: BlockRow, x: Tensor, y: Tensor, needs_x: bool
) -> tuple[Tensor, list[Tensor]]:
    """Returns this rank's value, and the tensors that `backward` takes beside the row."""
    if makes_gradients_at_once(task, x, y):
        value, *gradients = _sweep_and_weigh(task, row, needs_x)
        return value, gradients
    # Kept products only serve a second sweep over the same blocks.
    budget = task.options.memory_budget if task.shard.all_live else 0
    own, swept, lines = sweep(task, row, budget)
    return _value(task, own), [*lines, *swept[:2], *swept.kept]


def backward(
    task: LossTask, row: BlockRow, inputs: LossInputs, found: Sequence[Tensor],
    needs: Sequence[bool], g: Tensor,
) -> list[Tensor | None]:  # fmt: skip
    """Returns the gradients of x, y, scale and bias for the upstream gradient g. The row needs no
    tensors if the forward has made the gradients."""
    if makes_gradients_at_once(task, *inputs[:2]):
        return _scale_backward(task, inputs, found, needs, g)
    return _weigh_backward(task, row, inputs, found, needs, g)


def makes_gradients_at_once(task: LossTask, x: Tensor, y: Tensor) -> bool:
    """True if the forward makes the gradients, for an upstream gradient of 1, which saves a sweep.

    Weights must need no state. The gradients wait in fp32, O(B D), so this is not for the ring.
    """
    wide = accumulation_dtype(x)
    return (
        task.kind.is_linear
        and not task.mode.ring
        and task.shard.all_live
        and (x.device.type == "cuda" or x.dtype == y.dtype == wide == task.options.dtype)
    )


def _sweep_and_weigh(
    task: LossTask, row: BlockRow, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns this rank's value, dx, dy of all columns and (dbias, dscale), for upstream 1."""
    shard, x = task.shard, row.block.x.features
    (every,) = row.columns.start(row.block.y.features)
    if row.rows == 0:
        dtype = accumulation_dtype(x)
        dx, dy = (
            t.new_zeros(t.shape if needed else (0, t.shape[1]), dtype=dtype)
            for t, needed in ((x, needs_x), (every.features, shard.needs_y))
        )
        nothing = dx.new_zeros(2, dtype=state_dtype(x.device))
        return _value(task, nothing.sum()), dx, dy, nothing
    share = torch.full(
        (), shard.world_size / shard.batch, dtype=state_dtype(x.device), device=x.device
    )
    state, positive, *gradients = operators.sweep_and_weigh(
        row.engine, row.visited(slice(0, row.rows), every), share, needs_x, shard.needs_y,
        row.normalize,
    )  # fmt: skip
    losses, *_ = task.finish(row, state[:, : row.rows], positive)
    return _value(task, losses.sum()), *gradients


def _scale_backward(
    task: LossTask, inputs: LossInputs, found: Sequence[Tensor], needs: Sequence[bool], g: Tensor
) -> list[Tensor | None]:
    x, y, scale, bias = inputs
    dx, dy, dbias_dscale = found
    needs_x, needs_y, needs_scale, needs_bias = needs[:4]
    if task.shard.needs_y:
        dy = task.shard.scatter_sum(dy * g)
    dbias, dscale = (dbias_dscale * g).unbind()
    return [
        cast(dx * g, x.dtype) if needs_x else None,
        cast(dy, y.dtype) if needs_y else None,
        scalar_like(dscale, scale) if needs_scale else None,
        scalar_like(dbias, bias) if needs_bias else None,
    ]


class _UpstreamFactors(NamedTuple):
    """The factors of a rank's gradients.

    The largest upstream gradient goes into `gain`, so that weights are of order 1.
    """

    gain: Tensor
    of_rows: Tensor | float  # (b)
    of_columns: Tensor | float  # (B)
    afterwards: Tensor | float  # multiplies both towers' gradients at the end


def _upstream_factors(task: LossTask, g: Tensor, dtype: torch.dtype) -> _UpstreamFactors:
    shard, mode = task.shard, task.mode
    if mode.whole_value:
        # The gradient of the loss of all pairs, for the upstream of all ranks or of this one.
        gain = torch.full((), 1 / shard.batch, dtype=dtype, device=g.device)
        every = shard.sum(g.reshape(1).clone()).reshape(()) if mode.from_others else g
        return _UpstreamFactors(gain, 1.0, 1.0, every)
    upstreams = shard.gather_scalar(g).to(dtype)
    largest = upstreams.abs().amax()
    relative = shard.by_pair(upstreams / torch.where(largest > 0, largest, 1))
    share = shard.world_size / shard.batch
    return _UpstreamFactors(largest * share, relative[shard.mine], relative, 1.0)


def _weigh_backward(
    task: LossTask, row: BlockRow, inputs: LossInputs, found: Sequence[Tensor],
    needs: Sequence[bool], g: Tensor,
) -> list[Tensor | None]:  # fmt: skip
    shard, mode = task.shard, task.mode
    own_x, own_y, scale, bias = inputs
    count = len(_WeightFactors._fields)
    lines, (state, positive, *kept) = _WeightFactors(*found[:count]), found[count:]
    swept = Swept(state, positive, tuple(kept))
    upstream = _upstream_factors(task, g, state.dtype)
    a, b = lines.coefficients.split([shard.rows, shard.batch])
    a, b = a * upstream.of_rows, b * upstream.of_columns
    # Both are of this rank's pairs, so both take the upstream gradient of this rank's rows.
    of_rows, of_columns = lines.of_rows * upstream.of_rows, lines.of_columns * upstream.of_rows

    def gradients(
        a: Tensor, b: Tensor, weights: Tensor, needs_x: bool, needs_y: bool
    ) -> operators.Gradients:
        weighing = RowWeighing(row, swept, Upstream(torch.cat((a, b)), weights, upstream.gain))
        return weighing.run(needs_x, needs_y)

    needs_x, needs_y, needs_scale, needs_bias = needs[:4]
    if mode.from_others or mode.whole_value:
        dx, dy, totals, _ = gradients(a, b, of_rows + of_columns, needs_x, shard.needs_y)
    else:
        # Each tower gets only the gradient of its own rank's loss: rows for x, columns for y.
        dx, _, of_x, _ = gradients(a, b * 0, of_rows, needs_x, False)
        _, dy, of_y, _ = gradients(a * 0, b, of_columns, False, shard.needs_y)
        totals = of_x + of_y
    if mode.whole_value:
        totals = shard.sum(totals) * g
        dx, dy = dx * upstream.afterwards, dy * upstream.afterwards
    x, y = row.block.x, row.block.y
    own_factor = None if y.factor is None else y.factor[shard.mine]
    if bias is None or row.block.bias is None:
        dbias = None if bias is None else torch.zeros_like(bias)
    else:
        dbias = scalar_like(totals[0], bias)
    return [
        to_features(dx, x.factor, own_x.dtype) if needs_x else None,
        to_features(dy, own_factor, own_y.dtype) if needs_y else None,
        scalar_like(totals[1], scale) if needs_scale else None,
        dbias if needs_bias else None,
    ]
