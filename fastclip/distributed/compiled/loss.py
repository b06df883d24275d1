"""The operators `rank_loss` and `rank_loss_backward`: CLIP's and SigLIP's loss across ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...engine.fused_loss import LossInputs, LossOptions
from ...engine.namespace import OPS
from .. import sharded_loss
from ..agreement import group_named
from ..block_row import TENSOR_COUNT, BlockRow
from ..calls import LossCall, begin_loss, checked_loss
from ..gradient_mode import GradientMode
from .rank_operator import (
    Trace,
    by_input,
    define,
    fakes_like,
    gathered_tensors,
    leaves,
    register_backward,
    requested,
    split,
    with_gathered_tensors,
)
from .shards import check_ranks, exchanged_needs, pretended_shard, rebuilt_shard


class TracedOptions(NamedTuple):
    """The fields of `LossCall`, flat and typed for a schema; all but `uneven`, which is False."""

    kind: str
    whole_value: bool
    from_others: bool
    ring: bool
    normalize: bool
    backend: str | None
    memory_budget: int | None
    live: list[int] | None
    module: str | None
    rank: int
    world_size: int
    loss: str
    dtype: torch.dtype

    SCHEMA = (
        "str kind, bool whole_value, bool from_others, bool ring, bool normalize, str? backend,"
        " int? memory_budget, int[]? live, str? module, int rank, int world_size, str loss,"
        " ScalarType dtype"
    )

    @classmethod
    def of(cls, call: LossCall, dtype: torch.dtype) -> TracedOptions:
        live = None if call.live is None else list(call.live)
        module, rank, world_size = call.world or (None, 0, 0)
        return cls(
            call.kind, *call.mode, bool(call.normalize), call.backend, call.memory_budget, live,
            module, rank, world_size, call.loss, dtype,
        )  # fmt: skip

    @property
    def mode(self) -> GradientMode:
        return GradientMode(self.whole_value, self.from_others, self.ring)

    @property
    def call(self) -> LossCall:
        return LossCall(
            self.kind, self.mode, False, self.normalize, self.backend, self.memory_budget,
            None if self.live is None else tuple(self.live),
            None if self.module is None else (self.module, self.rank, self.world_size),
            self.loss, self.dtype,
        )  # fmt: skip


def _loss_results(inputs: LossInputs, task: sharded_loss.LossTask, trace: Trace) -> list[Tensor]:
    own = task.own(*inputs)
    row = task.row(own)
    if not trace.saves:
        return [sharded_loss.value_alone(task, row)]
    x, y = inputs[:2]
    at_once = sharded_loss.makes_gradients_at_once(task, x, y)
    value, found = sharded_loss.forward(task, row, x, y, trace.needs[0])
    beside = [] if at_once else gathered_tensors(row.block, own)
    if at_once and not task.shard.needs_y:
        # No rank needs dy here. The fake could not know that, so dy has its full shape.
        dx, dy, totals = found
        found = [dx, dy.new_empty((task.shard.batch, *dy.shape[1:])), totals]
    return [value, exchanged_needs(task.shard), *beside, *found]


def _rank_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, *arguments: Any
) -> list[Tensor]:
    options, trace = split(TracedOptions, arguments)
    check_ranks(trace)
    inputs = leaves((x, y, scale, bias), trace.needs)
    with torch.set_grad_enabled(trace.saves):
        inputs, task = begin_loss(inputs, group_named(trace.group), options.call)
    with torch.no_grad():
        return _loss_results(inputs, task, trace)


def _fake_rank_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, *arguments: Any
) -> list[Tensor]:
    options, trace = split(TracedOptions, arguments)
    try:
        checked = checked_loss((x, y, scale, bias), group_named(trace.group), options.call)
    except (TypeError, ValueError, RuntimeError):
        return [x.new_empty((), dtype=torch.float32)]
    shard = pretended_shard(trace, x.shape[0], checked.live)
    task = sharded_loss.LossTask(checked.options, shard, options.mode)
    return _loss_results(checked.inputs, task, trace)


def _rank_loss_backward(
    upstream: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None,
    saved: Sequence[Tensor], *arguments: Any,
) -> list[Tensor]:  # fmt: skip
    options, trace = split(TracedOptions, arguments)
    inputs, (needs, *saved) = (x, y, scale, bias), saved
    loss_options = LossOptions(
        options.kind, trace.engine, options.dtype, options.normalize, "mean", 0
    )
    shard = rebuilt_shard(trace, x.shape[0], options.live, needs)
    task = sharded_loss.LossTask(loss_options, shard, options.mode)
    block = task.own(*inputs)
    if not sharded_loss.makes_gradients_at_once(task, x, y):
        block, saved = with_gathered_tensors(block, saved[:TENSOR_COUNT]), saved[TENSOR_COUNT:]
    row = BlockRow(loss_options.engine, task.columns, loss_options.normalize, block)
    gradients = sharded_loss.backward(task, row, inputs, saved, trace.needs, upstream)
    return requested(gradients)


def _fake_rank_loss_backward(upstream: Tensor, *arguments: Any) -> list[Tensor]:
    return fakes_like(arguments[:4], arguments)


def _loss_gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    inputs, (_, *saved) = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    g, needs = upstream[0], Trace(*ctx.arguments[-len(Trace._fields) :]).needs
    with torch.no_grad():
        found = OPS.rank_loss_backward(g, *inputs, saved, *ctx.arguments)
    return *by_input(found, needs, (g, *inputs[:3])), *(None for _ in ctx.arguments)


_INPUTS = "Tensor x, Tensor y, Tensor scale, Tensor? bias"

define(
    "rank_loss", f"({_INPUTS}, {TracedOptions.SCHEMA}, {Trace.SCHEMA}) -> Tensor[]",
    _rank_loss, _fake_rank_loss,
)  # fmt: skip
define(
    "rank_loss_backward",
    f"(Tensor upstream, {_INPUTS}, Tensor[] saved, {TracedOptions.SCHEMA}, {Trace.SCHEMA})"
    " -> Tensor[]",
    _rank_loss_backward, _fake_rank_loss_backward,
)  # fmt: skip
register_backward("rank_loss", _loss_gradients, 4, lambda _: 1)
