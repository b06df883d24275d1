"""The differentiable statistics of rows and columns that `contrast` returns.

The forward sweeps once; the backward turns the upstream gradients into coefficients of lines and
weighs once. `line_formulas.py` has the formulas between these sweeps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds import LineStatistics
from . import operators, pairs
from .autograd import (
    as_inputs,
    bias_of,
    cast,
    differentiates,
    is_traced,
    refuse_second_derivative,
    side_of,
    with_inputs,
    without_inputs,
)
from .block import Block, Side, SweepResults, Wanted
from .dtypes import accumulation_dtype
from .kept import KEPT_BY
from .line_formulas import (
    as_line_statistics,
    statistics_from_states,
    upstream_of,
    wanted_statistics,
)
from .tiny_norms import EPS


class StatisticsOptions(NamedTuple):
    """The options of one call of `contrast`, checked, with the engine chosen."""

    engine: str
    dtype: torch.dtype  # of the products
    normalize: bool
    rows: bool
    columns: bool
    memory_budget: int


class StatisticsInputs(NamedTuple):
    """The tensors that have gradients."""

    x: Tensor  # (M, D)
    y: Tensor  # (N, D)
    scale: Tensor  # one element
    bias: Tensor | None  # one element
    key_bias: Tensor | None  # (N)


def block_of(
    inputs: StatisticsInputs, ids: tuple[Tensor, Tensor] | None, margin: Tensor | None, offset: int,
    kind: str, same_id_positive: bool, options: StatisticsOptions,
) -> Block:  # fmt: skip
    """The block of the inputs, without gradients."""
    with torch.no_grad():
        x, y = (side_of(t, options.dtype, options.normalize) for t in inputs[:2])
        if ids is not None:
            codes = pairs.codes_of(*ids)
            x, y = x._replace(ids=codes[0]), y._replace(ids=codes[1])
        if margin is not None:
            limits = pairs.thresholds(x, y, offset, margin)
            x, y = x._replace(threshold=limits[0]), y._replace(threshold=limits[1])
        bias = bias_of(inputs.bias, kind)
        return Block(
            x, y, inputs.scale, bias, inputs.key_bias, None, offset, kind, same_id_positive
        )


def line_statistics(
    inputs: StatisticsInputs, block: Block, options: StatisticsOptions
) -> LineStatistics:
    """The statistics of the inputs' block, differentiable in the inputs."""
    with torch.no_grad():
        occupied = pairs.occupied(block, sum(block.sizes()), options.rows, options.columns)
    if differentiates(*inputs):
        if is_traced():
            flat = without_inputs(block).flat()
            found = _TracedStatistics.apply(*inputs, *flat, occupied, *options)
        else:
            found = _LineStatistics.apply(*inputs, block, occupied, options)
    else:
        state, positive, _ = operators.sweep(options.engine, block, occupied=occupied)
        found = statistics_from_states(block, state, positive, inputs.bias)
    return wanted_statistics(found, block.same_id_positive, options.rows, options.columns)


def _forward(
    inputs: StatisticsInputs, block: Block, occupied: Tensor | None, options: StatisticsOptions
) -> tuple[tuple[Tensor, ...], SweepResults]:
    keep = KEPT_BY[options.engine].keep(block, options.memory_budget)
    statistics = operators.sweep(options.engine, block, occupied=occupied, keep=keep)
    return statistics_from_states(
        block, statistics.state, statistics.positive, inputs.bias
    ), statistics


def _save(
    ctx: Any,
    inputs: StatisticsInputs,
    block: Block,
    options: StatisticsOptions,
    output: tuple[Tensor, ...],
) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.block_options = block.offset, block.kind, block.same_id_positive
    ctx.save_for_backward(*inputs, *block.x, *block.y, *output)


def _backward(ctx: Any, upstream: tuple[Any, ...]) -> list[Tensor | None]:
    """Gradients of the inputs."""
    saved, sides = ctx.saved_tensors, []
    inputs, saved = (
        StatisticsInputs(*saved[: len(StatisticsInputs._fields)]),
        saved[len(StatisticsInputs._fields) :],
    )
    for _ in range(2):
        sides.append(Side(*saved[: len(Side._fields)]))
        saved = saved[len(Side._fields) :]
    block = Block(*sides, inputs.scale, None, None, None, *ctx.block_options)
    with torch.no_grad():
        gradients = _gradients(ctx, inputs, with_inputs(block, *inputs[2:]), saved, upstream)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        sources = [g for g in upstream if g is not None]
        gradients = refuse_second_derivative(gradients, *sources, *inputs[:3])
    return gradients


class _LineStatistics(torch.autograd.Function):
    """The statistics in eager mode."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, block, occupied, options = arguments
        found, statistics = _forward(StatisticsInputs(*inputs), block, occupied, options)
        _save(ctx, StatisticsInputs(*inputs), block, options, (*found, *statistics))
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, upstream), None, None, None


class _TracedStatistics(torch.autograd.Function):
    """The statistics for torch.compile and torch.func. `fused_loss._TracedLoss` says why these need
    another Function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        found, statistics = _forward(*_unpacked(arguments))
        return *found, *statistics

    @staticmethod
    def setup_context(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        inputs, block, _, options = _unpacked(arguments)
        ctx.mark_non_differentiable(*output[-len(SweepResults._fields) :])
        _save(ctx, inputs, block, options, output)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        others = Block.COUNT + 1 + len(ctx.options)
        return *_backward(ctx, upstream), *(None for _ in range(others))


def _unpacked(
    arguments: tuple[Any, ...],
) -> tuple[StatisticsInputs, Block, Tensor | None, StatisticsOptions]:
    count = len(StatisticsInputs._fields)
    block, (occupied, *options) = Block.of(arguments[count:])
    inputs = StatisticsInputs(*arguments[:count])
    return inputs, with_inputs(block, *inputs[2:]), occupied, StatisticsOptions(*options)


def _gradients(
    ctx: Any,
    inputs: StatisticsInputs,
    block: Block,
    output: tuple[Tensor, ...],
    upstream: tuple[Any, ...],
) -> list[Tensor | None]:
    needs = StatisticsInputs(*ctx.needs_input_grad[: len(StatisticsInputs._fields)])
    *found, state, positive, kept = output
    found, given = (as_line_statistics(t, block.same_id_positive) for t in (found, upstream))
    if all(g is None for g in given._replace(positives=None)) and not is_traced():
        of_own = given.positives
        return (
            [None] * len(needs)
            if of_own is None
            else _own_positives_backward(ctx, inputs, block, of_own)
        )
    coefficients, of_bias = upstream_of(block, inputs.bias, found, state, given)
    options = ctx.options
    dx, dy, totals, dkey_bias = operators.weigh(
        options.engine, block, SweepResults(state, positive, kept), coefficients,
        Wanted(needs.x, needs.y, needs.key_bias, options.normalize, inputs.x.dtype, inputs.y.dtype),
    )  # fmt: skip
    if of_bias is not None:
        _, of_scale = totals
        totals = torch.stack((of_bias, of_scale))
    return [
        *as_inputs((dx, dy, totals), inputs[:-1], needs[:-1]),
        cast(dkey_bias, inputs.key_bias.dtype) if needs.key_bias else None,
    ]


def _own_positives_backward(
    ctx: Any, inputs: StatisticsInputs, block: Block, g: Tensor
) -> list[Tensor | None]:
    """Gradients of the own positives' logits alone: autograd of their formula, O((M + N) D)."""
    needs = ctx.needs_input_grad[: len(StatisticsInputs._fields)]
    leaves = [
        None if t is None else t.detach().requires_grad_(needed)
        for t, needed in zip(inputs, needs, strict=True)
    ]
    x, y, scale, bias, key_bias = leaves
    with torch.enable_grad():
        wide = accumulation_dtype(block.x.features)
        sides = [t.to(ctx.options.dtype).to(wide) for t in (x, y)]
        if ctx.options.normalize:
            sides = [F.normalize(t, dim=1, eps=EPS) for t in sides]
        columns, inside = pairs.partners(*block.sizes(), block.offset, g.device)
        logits = scale.reshape(()).to(g.dtype) * (sides[0] * sides[1][columns]).sum(1).to(g.dtype)
        if bias is not None:
            logits = logits + bias.reshape(()).to(g.dtype)
        if key_bias is not None:
            logits = logits + key_bias.to(g.dtype)[columns]
        wanted = [t for t, needed in zip(leaves, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(logits, wanted, torch.where(inside, g, 0)))
    return [next(found) if needed else None for needed in needs]
