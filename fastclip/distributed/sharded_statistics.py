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
from ..engine.beside import Beside
from ..engine.block import Block, Side, Upstream
from ..engine.dtypes import state_dtype
from ..engine.group_sums import Groups
from ..engine.line_formulas import (
    Request,
    as_line_statistics,
    means_upstream,
    statistics_from_states,
    upstream_of,
    wanted_statistics,
    with_levels,
)
from ..engine.line_means import LineGroups, LineMeans, by_label, one_group
from ..engine.statistics_call import StatisticsInputs, StatisticsOptions, block_of
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
    beside: Beside
    offset: int
    kind: str
    shard: Shard  # the shard of columns
    ring: bool


def sharded_statistics(inputs: StatisticsInputs, task: StatisticsTask) -> LineStatistics:
    """The statistics of this rank's rows and columns, over the pairs of all ranks."""
    if differentiates(*inputs):
        found = _ShardedStatistics.apply(*inputs, task)
    else:
        row = row_of(own_of(inputs, task), task)
        found, *_ = forward(inputs, row, task.beside.labels, task.options, budget=0)
    return wanted_statistics(found, task.options.request)


def own_of(inputs: StatisticsInputs, task: StatisticsTask) -> Block:
    """The block of own rows and own columns, without ids."""
    own = block_of(inputs, task.beside._replace(ids=None), task.offset, task.kind, task.options)
    # Ids and labels are compared across ranks, see `row_of`.
    return own._replace(x=own.x._replace(ids=None), y=own.y._replace(ids=None))


def row_of(own: Block, task: StatisticsTask) -> BlockRow:
    """The block of own rows and all ranks' columns, with codes of ids that all ranks share."""
    options, (ids, _, labels, *_) = task.options, task.beside
    if labels is not None and ids is None:
        columns = torch.arange(own.sizes()[1], device=labels.device) + task.shard.start
        ids = (labels.long() + task.shard.start, columns)
    if ids is not None:
        ids_x, ids_y = (side.to(torch.int64) for side in ids)
        own = own._replace(x=own.x._replace(ids=ids_x), y=own.y._replace(ids=ids_y))
    row = BlockRow.of(options.engine, columns_of(*own.sizes(), task), options.normalize, own)
    if ids is None:
        return row
    x, y = row.block.x, row.block.y
    codes = pairs.codes_of(x.ids, y.ids)
    block = row.block._replace(x=x._replace(ids=codes[0]), y=y._replace(ids=codes[1]))
    return row._replace(block=block)


def columns_of(m: int, n: int, task: StatisticsTask) -> Gathered | Ring:
    """The way in which all ranks' columns come to this rank's m rows. n: its own columns."""
    if task.ring:
        return Ring(task.shard)
    # One offset serves all columns if every row or no row has its positive on this rank.
    some = with_positive(m, n, task.offset) if task.beside.labels is None else 0
    return Gathered(task.shard, apart=task.shard.world_size > 1 and 0 < some < m)


def _own_block(row: BlockRow) -> Block:
    """The block of own rows and own columns, without ids and thresholds, which statistics do not
    need."""
    block, mine = row.block, row.shard.mine
    key_bias, factor = (
        None if vector is None else vector[mine] for vector in (block.key_bias, block.y.factor)
    )
    y = Side(row.columns.own(block.y.features), factor)
    return block._replace(x=Side(*block.x[:2]), y=y, key_bias=key_bias)


def _own_lines(state: Tensor, row: BlockRow) -> Tensor:
    """Selects own rows and own columns from the states of own rows and all columns."""
    return torch.cat((state[:, : row.rows], state[:, row.rows :][:, row.shard.mine]), 1)


def forward(
    inputs: StatisticsInputs, row: BlockRow, labels: Tensor | None, options: StatisticsOptions,
    budget: int,
) -> tuple[tuple[Tensor, ...], Swept, Tensor | None]:  # fmt: skip
    """Returns statistics, and for `backward` the result of the sweep and the levels of own rows and
    all columns (m + B), for a kind with levels."""
    request = options.request

    def occupied(block: Block) -> Tensor | None:
        codes = row.rows + row.shard.batch
        return pairs.occupied(block, codes, request.rows, request.columns)

    levels = None
    with torch.no_grad():
        if row.kind.has_levels:
            own = pairs.levels(_own_block(row), labels, inputs.bias, options.above)
            levels = torch.cat((own[: row.rows], row.shard.gather(own[row.rows :])))
        swept = sweep(row, slice(0, row.rows), budget, occupied, levels)
        columns = swept.state[:, row.rows :]
        if request.columns:
            columns.copy_(merge_columns(columns, row.kind, row.shard))
        elif request.one_set:
            # Each column is a row of its rank, where its state is complete.
            of_rows = swept.state[:, : row.rows].movedim(-1, 0).contiguous()
            columns.copy_(row.shard.gather(of_rows).movedim(0, -1))
        return (
            statistics_from_states(
                _own_block(row),
                _own_lines(swept.state, row),
                swept.positive,
                inputs.bias,
                request,
                _means_of(row, labels, request),
            ),
            swept,
            levels,
        )


def _means_of(row: BlockRow, labels: Tensor | None, request: Request) -> LineMeans | None:
    """The means of own rows and own columns, over the pairs of all ranks."""
    if labels is None and not request.means:
        return None
    shard, m, block = row.shard, row.rows, row.block
    device = block.x.features.device
    every = by_id = labelled = None
    if request.means:
        every = one_group(m, shard.rows, device, shard.sum)
        if block.x.ids is not None:
            rows, columns = pairs.numbers_of(block.x.ids, block.y.ids)
            by_id = Groups(rows, columns[shard.mine], shard.batch, shard.sum)
            by_id = by_id.without_own(block.offset)
    if labels is not None:
        labelled = by_label(labels, shard.rows)
    own, groups = _own_block(row), LineGroups(every, by_id, labelled)
    # No rank has more groups than there are columns in all.
    lines = max(m, shard.most_rows) + max(shard.sizes) + shard.batch
    return LineMeans(own, groups, state_dtype(device), request.means, request.one_set, lines)


class _ShardedStatistics(torch.autograd.Function):
    """Missing upstream gradients arrive as zeros, so that all ranks make the same exchanges."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, task = arguments
        inputs = StatisticsInputs(*tensors)
        row = row_of(own_of(inputs, task), task)
        found, swept, levels = forward(
            inputs, row, task.beside.labels, task.options, task.options.memory_budget
        )
        ctx.row, ctx.options, ctx.found = row.without_tensors(), task.options, len(found)
        of_sweep = swept.state, swept.positive, *swept.kept
        ctx.save_for_backward(*inputs, *row.tensors, task.beside.labels, levels, *found, *of_sweep)
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        count = len(StatisticsInputs._fields)
        inputs, saved = StatisticsInputs(*ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        row, saved = ctx.row.with_tensors(saved[:TENSOR_COUNT]), saved[TENSOR_COUNT:]
        labels, levels, *saved = saved
        found, (state, positive, *kept) = saved[: ctx.found], saved[ctx.found :]
        swept = Swept(state, positive, tuple(kept))
        with torch.no_grad():
            gradients = backward(
                inputs,
                row,
                labels,
                levels,
                ctx.options,
                found,
                swept,
                upstream,
                ctx.needs_input_grad,
            )
        if torch.is_grad_enabled():
            gradients = refuse_second_derivative(gradients, *upstream, *inputs[:3])
        return *gradients, None


def _gather_upstream(row: BlockRow, options: StatisticsOptions, own: Upstream) -> Upstream:
    """Returns the factors for a block row: the coefficients of columns are gathered."""
    shard, m = row.shard, row.rows
    coefficients, positive_weight, largest = own
    if not (options.request.columns or options.request.one_set):
        none = coefficients.new_zeros((*coefficients.shape[:-1], shard.batch))
        return own._replace(coefficients=torch.cat((coefficients[..., :m], none), -1))
    # Each rank's coefficients are relative to its largest; columns of all ranks need one unit.
    gain = shard.max(largest.reshape(1).clone()).reshape(())
    ratio = torch.where(gain > 0, largest / gain, 1)
    coefficients = coefficients * ratio
    every = shard.gather(coefficients[..., m:].movedim(-1, 0).contiguous()).movedim(0, -1)
    return Upstream(torch.cat((coefficients[..., :m], every), -1), positive_weight * ratio, gain)


def backward(
    inputs: StatisticsInputs, row: BlockRow, labels: Tensor | None, levels: Tensor | None,
    options: StatisticsOptions, found: Sequence[Tensor], swept: Swept, upstream: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Returns the gradients of the inputs for upstream gradients of the statistics."""
    shard, needs = row.shard, StatisticsInputs(*wanted[: len(StatisticsInputs._fields)])
    request = options.request
    found, given = (as_line_statistics(t, request) for t in (found, upstream))
    line_means, of_means = _means_of(row, labels, request), None
    if line_means is not None:
        of_means = line_means.factors(
            means_upstream(row.block, found, swept.state, given, labels is not None)
        )
    own, of_bias = upstream_of(
        _own_block(row), inputs.bias, found, _own_lines(swept.state, row), given, request, of_means
    )
    swept = swept._replace(state=with_levels(swept.state, levels))
    dx, dy, totals, dkey_bias = RowWeighing(row, swept, _gather_upstream(row, options, own)).run(
        needs.x, shard.needs_y, shard.needs_key_bias
    )
    if shard.needs_key_bias:
        dkey_bias = shard.scatter_sum(dkey_bias)
    dbias, dscale = totals.unbind()
    if request.one_set:
        dbias, dscale = dbias / 2, dscale / 2
    if kind_of(row.block.kind).has_shift:
        dbias = of_bias
    if of_means is not None:
        more, more_key_bias = line_means.add_gradients(
            of_means, dx if needs.x else None, dy if shard.needs_y else None
        )
        dscale = dscale + more
        if shard.needs_key_bias:
            dkey_bias = dkey_bias + more_key_bias
        if not kind_of(row.block.kind).has_shift:
            dbias = dbias + of_means.of_bias
    factor_y = row.block.y.factor
    factor_y = None if factor_y is None else factor_y[shard.mine]
    return [
        to_features(dx, row.block.x.factor, inputs.x.dtype) if needs.x else None,
        to_features(dy, factor_y, inputs.y.dtype) if needs.y else None,
        scalar_like(dscale, inputs.scale) if needs.scale else None,
        scalar_like(dbias, inputs.bias) if needs.bias else None,
        cast(dkey_bias, inputs.key_bias.dtype) if needs.key_bias else None,
    ]
