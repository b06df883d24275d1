"""The operators `rank_contrast` and `rank_contrast_backward`: statistics of lines across ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...engine.beside import Beside, Given
from ...engine.block import NO_POSITIVES, Block
from ...engine.dtypes import state_dtype
from ...engine.kept import KEPT_BY
from ...engine.line_formulas import names_of
from ...engine.namespace import OPS
from ...engine.statistics_call import StatisticsInputs, StatisticsOptions
from .. import sharded_statistics
from ..agreement import group_named
from ..block_row import TENSOR_COUNT, BlockRow, Swept
from ..calls import ContrastCall, begin_contrast, checked_contrast, request_of
from ..sharded_statistics import StatisticsTask
from .rank_operator import (
    Trace,
    by_input,
    define,
    fakes_like,
    gathered_tensors,
    leaves,
    register_backward,
    requested,
    separate_memory,
    split,
    with_gathered_tensors,
)
from .shards import check_ranks, exchanged_needs, pretended_shard, rebuilt_shard

# The fields of `ContrastCall`, in its order.
_SCHEMA = (
    "int? offset, str same_id, bool rows, bool columns, bool means, bool teaches, bool guided,"
    " bool one_set, str kind, float? above, bool normalize, bool ring, bool uneven, str? backend,"
    " int? memory_budget,"
    " str loss, ScalarType dtype"
)
_INPUTS = "Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? key_bias"
_OTHERS = (
    "Tensor? x_ids, Tensor? y_ids, Tensor? margin, Tensor? x_target, Tensor? y_target,"
    " Tensor? target_scale, Tensor? limits, Tensor? labels"
)


def _contrast_results(inputs: StatisticsInputs, task: StatisticsTask, trace: Trace) -> list[Tensor]:
    own = sharded_statistics.own_of(inputs, task)
    row = sharded_statistics.row_of(own, task)
    # The shapes of kept products would depend on the rank's number if columns visit apart.
    apart = not task.ring and row.columns.apart
    budget = task.options.memory_budget if trace.saves and not apart else 0
    labels = task.beside.labels
    found, swept, levels = sharded_statistics.forward(inputs, row, labels, task.options, budget)
    found = separate_memory(found)
    if not trace.saves:
        return found
    beside = gathered_tensors(_with_codes_apart(row.block), _without_beside(own))
    kept = () if apart else swept.kept
    levels = swept.state.new_empty(0) if levels is None else levels
    needs = exchanged_needs(task.shard)
    return [*found, needs, *beside, levels, swept.state, swept.positive, *kept]


def _with_codes_apart(block: Block) -> Block:
    """The block with codes of rows and columns in separate memory, for an operator's results."""
    x, y = block.x, block.y
    if x.ids is None:
        return block
    return block._replace(x=x._replace(ids=x.ids.clone()), y=y._replace(ids=y.ids.clone()))


def _without_beside(own: Block) -> Block:
    """The block as the backward makes it: from the inputs alone."""
    x, y = (side._replace(threshold=None, target=None, target_factor=None) for side in own[:2])
    return own._replace(x=x, y=y, target_scale=None)


def _given(arguments: Sequence[Any]) -> tuple[tuple[Any, ...], ContrastCall, Trace]:
    """Splits the arguments after the inputs into those beside them, the options, the trace."""
    x_ids, y_ids, margin, *targets, limits, labels = arguments[: _OTHERS.count(",") + 1]
    call, trace = split(ContrastCall, arguments[_OTHERS.count(",") + 1 :])
    given = Given(None if x_ids is None else (x_ids, y_ids), margin, labels, limits=limits)
    if targets[2] is not None:
        given = given._replace(targets=tuple(targets))
    if call.guided:
        given = given._replace(guide=tuple(targets[:2]))
    return given, call, trace


def _rank_contrast(*arguments: Any) -> list[Tensor]:
    count = len(StatisticsInputs._fields)
    others, call, trace = _given(arguments[count:])
    check_ranks(trace)
    inputs = leaves(arguments[:count], trace.needs)
    with torch.set_grad_enabled(trace.saves):
        inputs, task = begin_contrast((*inputs, others), group_named(trace.group), call)
    with torch.no_grad():
        return _contrast_results(inputs, task, trace)


def _fake_rank_contrast(*arguments: Any) -> list[Tensor]:
    count = len(StatisticsInputs._fields)
    others, call, trace = _given(arguments[count:])
    try:
        checked = checked_contrast((*arguments[:count], others), group_named(trace.group), call)
    except (TypeError, ValueError):
        m, n = (t.shape[0] if t.dim() else 1 for t in arguments[:2])
        dtype = state_dtype(arguments[0].device)
        sizes = [n if "column" in name else m for name in names_of(request_of(call))]
        return [arguments[0].new_empty((size,), dtype=dtype) for size in sizes]
    task = checked.task._replace(shard=pretended_shard(trace, checked.inputs.y.shape[0]))
    return _contrast_results(checked.inputs, task, trace)


def _rank_contrast_backward(upstream: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    count = len(StatisticsInputs._fields)
    inputs, (labels, found, saved, *rest) = StatisticsInputs(*arguments[:count]), arguments[count:]
    call, trace = split(ContrastCall, rest)
    needs, beside, (levels, state, positive, *kept) = (
        saved[0],
        saved[1 : TENSOR_COUNT + 1],
        saved[TENSOR_COUNT + 1 :],
    )
    options = StatisticsOptions(
        trace.engine, call.dtype, call.normalize, 0, call.above, request_of(call)
    )
    offset = NO_POSITIVES if call.offset is None else call.offset
    shard = rebuilt_shard(trace, inputs.y.shape[0], None, needs)
    beside_own = Beside(labels=labels, guided=call.guided)
    task = StatisticsTask(options, beside_own, offset, call.kind, shard, call.ring)
    own = sharded_statistics.own_of(inputs, task)
    columns = sharded_statistics.columns_of(*own.sizes(), task)
    row = BlockRow(trace.engine, columns, call.normalize, with_gathered_tensors(own, beside))
    if not kept:
        nothing = KEPT_BY[trace.engine].empty(own.x.features, own.y.features, 0)
        kept = [nothing] * columns.visits
    swept = Swept(state, positive, tuple(kept))
    gradients = sharded_statistics.backward(
        inputs,
        row,
        labels,
        levels if levels.numel() else None,
        options,
        found,
        swept,
        upstream,
        trace.needs,
    )
    return requested(gradients)


def _fake_rank_contrast_backward(upstream: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    return fakes_like(arguments[: len(StatisticsInputs._fields)], arguments)


def _contrast_gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    count = len(StatisticsInputs._fields)
    inputs, output = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    found, saved = list(output[: ctx.results]), list(output[ctx.results :])
    # All ranks must make the same exchanges, whichever statistics each of them uses.
    given = [torch.zeros_like(t) if g is None else g for t, g in zip(found, upstream, strict=False)]
    others = _OTHERS.count(",") + 1
    labels, options = ctx.arguments[others - 1], ctx.arguments[others:]
    with torch.no_grad():
        gradients = OPS.rank_contrast_backward(given, *inputs, labels, found, saved, *options)
    needs = Trace(*options[-len(Trace._fields) :]).needs
    sources = (*(g for g in upstream if g is not None), *inputs[:3])
    return *by_input(gradients, needs, sources), *(None for _ in ctx.arguments)


def _results_of_contrast(arguments: tuple[Any, ...]) -> int:
    _, call, _ = _given(arguments)
    return len(names_of(request_of(call)))


define(
    "rank_contrast", f"({_INPUTS}, {_OTHERS}, {_SCHEMA}, {Trace.SCHEMA}) -> Tensor[]",
    _rank_contrast, _fake_rank_contrast,
)  # fmt: skip
define(
    "rank_contrast_backward",
    f"(Tensor[] upstream, {_INPUTS}, Tensor? labels, Tensor[] statistics, Tensor[] saved,"
    f" {_SCHEMA}, {Trace.SCHEMA}) -> Tensor[]",
    _rank_contrast_backward, _fake_rank_contrast_backward,
)  # fmt: skip
register_backward(
    "rank_contrast", _contrast_gradients, len(StatisticsInputs._fields), _results_of_contrast
)
