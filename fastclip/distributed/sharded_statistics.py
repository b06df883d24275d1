"""The differentiable statistics of a batch that is spread over ranks, for `distributed.contrast`.

A rank sweeps its block of rows (`block_row.py`). The states of its rows are then complete, and the
ranks merge the states of columns, O(B). For its own rows and columns a rank then does what one
process does: it turns states into statistics, and upstream gradients into coefficients. The
coefficients of columns are gathered, O(B), since each rank's block row has a part of every column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine import pairs
from ..engine.autograd import cast, differentiates, refuse_second_derivative, scalar_like
from ..engine.block import Block, Side, Upstream
from ..engine.line_formulas import (
    as_line_statistics,
    statistics_from_states,
    upstream_of,
    wanted_statistics,
)
from ..engine.line_statistics import StatisticsInputs, StatisticsOptions, block_of
from ..kinds import LineStatistics, kind_of
from .block_row import (
    TENSOR_COUNT,
    BlockRow,
    RowWeighing,
    Swept,
    merge_columns,
    sweep,
    to_features,
    with_positive,
)
from .exchange import Gathered, Ring
from .shard import Shard


class StatisticsTask(NamedTuple):
    """All that a call of `distributed.contrast` needs beside the differentiable inputs."""

    options: StatisticsOptions
    ids: tuple[Tensor, Tensor] | None
    margin: Tensor | None
    offset: int
    kind: str
    same_id_positive: bool
    shard: Shard  # the shard of columns
    ring: bool


def sharded_statistics(inputs: StatisticsInputs, task: StatisticsTask) -> LineStatistics:
    """The statistics of this rank's rows and columns, over the pairs of all ranks."""
    if differentiates(*inputs):
        found = _ShardedStatistics.apply(*inputs, task)
    else:
        found, *_ = forward(inputs, row_of(own_of(inputs, task), task), task.options, budget=0)
    return wanted_statistics(found, task.same_id_positive, task.options.rows, task.options.columns)


def own_of(inputs: StatisticsInputs, task: StatisticsTask) -> Block:
    """The block of own rows and own columns, without ids."""
    return block_of(
        inputs, None, task.margin, task.offset, task.kind, task.same_id_positive, task.options
    )


def row_of(own: Block, task: StatisticsTask) -> BlockRow:
    options = task.options
    if task.ids is not None:
        ids_x, ids_y = (ids.to(torch.int64) for ids in task.ids)
        own = own._replace(x=own.x._replace(ids=ids_x), y=own.y._replace(ids=ids_y))
    row = BlockRow.of(options.engine, columns_of(*own.sizes(), task), options.normalize, own)
    if task.ids is None:
        return row
    x, y = row.block.x, row.block.y
    codes = pairs.codes_of(x.ids, y.ids)
    block = row.block._replace(x=x._replace(ids=codes[0]), y=y._replace(ids=codes[1]))
    return row._replace(block=block)


def columns_of(m: int, n: int, task: StatisticsTask) -> Gathered | Ring:
    if task.ring:
        return Ring(task.shard)
    # One offset serves all columns if every row or no row has its positive on this rank.
    some = with_positive(m, n, task.offset)
    return Gathered(task.shard, apart=task.shard.world_size > 1 and 0 < some < m)


def _own_block(row: BlockRow) -> Block:
    """The block of own rows and own columns, without the columns' factors, ids and thresholds,
    which statistics do not need."""
    block, mine = row.block, row.shard.mine
    key_bias = None if block.key_bias is None else block.key_bias[mine]
    return block._replace(y=Side(row.columns.own(block.y.features)), key_bias=key_bias)


def _own_lines(state: Tensor, row: BlockRow) -> Tensor:
    """Selects own rows and own columns from the states of own rows and all columns."""
    return torch.cat((state[:, : row.rows], state[:, row.rows :][:, row.shard.mine]), 1)


def forward(
    inputs: StatisticsInputs, row: BlockRow, options: StatisticsOptions, budget: int
) -> tuple[tuple[Tensor, ...], Swept]:
    """Returns statistics, and the result of the sweep for `backward`."""

    def occupied(block: Block) -> Tensor | None:
        codes = row.rows + row.shard.batch
        return pairs.occupied(block, codes, options.rows, options.columns)

    with torch.no_grad():
        swept = sweep(row, slice(0, row.rows), budget, occupied)
        if options.columns:
            columns = swept.state[:, row.rows :]
            columns.copy_(merge_columns(columns, row.kind, row.shard))
        return statistics_from_states(
            _own_block(row), _own_lines(swept.state, row), swept.positive, inputs.bias
        ), swept


class _ShardedStatistics(torch.autograd.Function):
    """Missing upstream gradients arrive as zeros, so that all ranks make the same exchanges."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, task = arguments
        inputs = StatisticsInputs(*tensors)
        row = row_of(own_of(inputs, task), task)
        found, swept = forward(inputs, row, task.options, task.options.memory_budget)
        ctx.row, ctx.options, ctx.found = row.without_tensors(), task.options, len(found)
        ctx.save_for_backward(
            *inputs, *row.tensors, *found, swept.state, swept.positive, *swept.kept
        )
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        count = len(StatisticsInputs._fields)
        inputs, saved = StatisticsInputs(*ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        row, saved = ctx.row.with_tensors(saved[:TENSOR_COUNT]), saved[TENSOR_COUNT:]
        found, (state, positive, *kept) = saved[: ctx.found], saved[ctx.found :]
        swept = Swept(state, positive, tuple(kept))
        with torch.no_grad():
            gradients = backward(
                inputs, row, ctx.options, found, swept, upstream, ctx.needs_input_grad
            )
        if torch.is_grad_enabled():
            gradients = refuse_second_derivative(gradients, *upstream, *inputs[:3])
        return *gradients, None


def _gather_upstream(row: BlockRow, options: StatisticsOptions, own: Upstream) -> Upstream:
    """Returns the factors for a block row: the coefficients of columns are gathered."""
    shard, m = row.shard, row.rows
    coefficients, positive_weight, largest = own
    if not options.columns:
        none = coefficients.new_zeros((*coefficients.shape[:-1], shard.batch))
        return own._replace(coefficients=torch.cat((coefficients[..., :m], none), -1))
    # Each rank's coefficients are relative to its largest; columns of all ranks need one unit.
    gain = shard.max(largest.reshape(1).clone()).reshape(())
    ratio = torch.where(gain > 0, largest / gain, 1)
    coefficients = coefficients * ratio
    every = shard.gather(coefficients[..., m:].movedim(-1, 0).contiguous()).movedim(0, -1)
    return Upstream(torch.cat((coefficients[..., :m], every), -1), positive_weight * ratio, gain)


def backward(
    inputs: StatisticsInputs, row: BlockRow, options: StatisticsOptions, found: Sequence[Tensor],
    swept: Swept, upstream: Sequence[Tensor], wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Returns the gradients of the inputs for upstream gradients of the statistics."""
    shard, needs = row.shard, StatisticsInputs(*wanted[: len(StatisticsInputs._fields)])
    found, given = (as_line_statistics(t, row.block.same_id_positive) for t in (found, upstream))
    own, of_bias = upstream_of(
        _own_block(row), inputs.bias, found, _own_lines(swept.state, row), given
    )
    dx, dy, totals, dkey_bias = RowWeighing(row, swept, _gather_upstream(row, options, own)).run(
        needs.x, shard.needs_y, shard.needs_key_bias
    )
    if shard.needs_key_bias:
        dkey_bias = shard.scatter_sum(dkey_bias)
    dbias, dscale = totals.unbind()
    if kind_of(row.block.kind).has_shift:
        dbias = of_bias
    factor_y = row.block.y.factor
    factor_y = None if factor_y is None else factor_y[shard.mine]
    return [
        to_features(dx, row.block.x.factor, inputs.x.dtype) if needs.x else None,
        to_features(dy, factor_y, inputs.y.dtype) if needs.y else None,
        scalar_like(dscale, inputs.scale) if needs.scale else None,
        scalar_like(dbias, inputs.bias) if needs.bias else None,
        cast(dkey_bias, inputs.key_bias.dtype) if needs.key_bias else None,
    ]
