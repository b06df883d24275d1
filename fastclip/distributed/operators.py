"""The operators of losses across ranks in a compiled graph: one for the forward, one for the
backward.

Checks, the ranks' agreement and all exchanges stay inside the operators, so that a graph holds the
loss whole and communicates when it runs, never while it is compiled. The forward's results are the
loss, or the statistics, and then whatever the backward takes, what other ranks told among it.

Compilers ask a fake for the results' shapes: it runs the very same functions, on a shard whose
exchanges return tensors of the right shapes and send nothing. Shapes depend on no rank's number,
and on nothing else that the graph does not name: compilers keep graphs on disk for all ranks.

Batches have one size: sizes that differ are known at run time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.autograd import refuse_second_derivative
from ..engine.block import NO_POSITIVES, Block
from ..engine.dtypes import state_dtype
from ..engine.fused_loss import LossOptions
from ..engine.kept import KEPT_BY
from ..engine.line_statistics import Inputs, StatisticsOptions, statistics_of
from . import sharded_loss, sharded_statistics
from .agreement import NEEDS, group_named, group_of, ranks_of
from .block_row import TENSORS, BlockRow, GradientMode, Swept
from .calls import ContrastCall, LossCall, begin_contrast, begin_loss, check_contrast, check_loss
from .shard import Parcel, Shard, starts_of
from .sharded_statistics import Task


class Trace(NamedTuple):
    """Facts that are known while a graph is made, and not within the operators."""

    group: str  # its name; "": all processes
    ranks: int
    engine: str  # "" if none serves the call, which fails when it runs
    needs: list[bool]  # which inputs require a gradient
    saves: bool  # a backward may follow
    edition: str  # of this library: another one may save other tensors

    SCHEMA = "str group, int ranks, str engine, bool[] needs, bool saves, str edition"


class TracedOptions(NamedTuple):
    """`LossCall`, flat."""

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
    dtype: torch.dtype

    SCHEMA = (
        "str kind, bool whole_value, bool from_others, bool ring, bool normalize, str? backend,"
        " int? memory_budget, int[]? live, str? module, int rank, int world_size, ScalarType dtype"
    )

    @classmethod
    def of(cls, call: LossCall, dtype: torch.dtype) -> TracedOptions:
        live = None if call.live is None else list(call.live)
        module, rank, world_size = call.world or (None, 0, 0)
        return cls(
            call.kind, *call.sharing, bool(call.normalize), call.backend, call.memory_budget, live,
            module, rank, world_size, dtype,
        )  # fmt: skip

    @property
    def sharing(self) -> GradientMode:
        return GradientMode(self.whole_value, self.from_others, self.ring)

    @property
    def call(self) -> LossCall:
        return LossCall(
            self.kind, self.sharing, False, self.normalize, self.backend, self.memory_budget,
            None if self.live is None else tuple(self.live),
            None if self.module is None else (self.module, self.rank, self.world_size), self.dtype,
        )  # fmt: skip


# The fields of `ContrastCall`, in its order.
_CONTRAST = (
    "int? offset, str same_id, bool rows, bool columns, str kind, bool normalize, bool ring,"
    " bool uneven, str? backend, int? memory_budget, ScalarType dtype"
)
_LOSS_INPUTS = "Tensor x, Tensor y, Tensor scale, Tensor? bias"
_CONTRAST_INPUTS = f"{_LOSS_INPUTS}, Tensor? key_bias"
_OTHERS = "Tensor? x_ids, Tensor? y_ids, Tensor? margin"

_SCHEMAS = {
    "rank_loss": f"({_LOSS_INPUTS}, {TracedOptions.SCHEMA}, {Trace.SCHEMA}) -> Tensor[]",
    "rank_loss_backward": f"(Tensor upstream, {_LOSS_INPUTS}, Tensor[] saved,"
    f" {TracedOptions.SCHEMA}, {Trace.SCHEMA}) -> Tensor[]",
    "rank_contrast": f"({_CONTRAST_INPUTS}, {_OTHERS}, {_CONTRAST}, {Trace.SCHEMA}) -> Tensor[]",
    "rank_contrast_backward": f"(Tensor[] upstream, {_CONTRAST_INPUTS}, Tensor[] statistics,"
    f" Tensor[] saved, {_CONTRAST}, {Trace.SCHEMA}) -> Tensor[]",
}


# ---- shards -----------------------------------------------------------------------------------


def _check_ranks(trace: Trace) -> None:
    """Raises on every rank, for all of them have the same group: before anything is exchanged."""
    ranks = ranks_of(group_named(trace.group))
    if ranks != trace.ranks:
        raise RuntimeError(
            "a compiled loss must run in the process group that it was compiled in, of "
            f"{trace.ranks} ranks, got one of {ranks}: compile after init_process_group"
        )


class Pretended(Shard):
    """Exchanges that send nothing: tensors of the right shapes."""

    __slots__ = ()

    def gather(self, x: Tensor) -> Tensor:
        return x if self.world_size == 1 else x.new_empty((self.batch, *x.shape[1:]))

    def _reduce(self, x: Tensor, op: Any) -> Tensor:
        return x

    def swap(self, parcels: list[Parcel]) -> list[dist.Work]:
        return []


def _told(shard: Shard) -> Tensor:
    """The part of a shard of even sizes that the backward could not know without an exchange; on
    the CPU, where reading it waits for nothing."""
    numbers_told = [int(getattr(shard, name)) for name in NEEDS]
    return torch.tensor(numbers_told, dtype=torch.int64, device="cpu")


def _even(
    kind: type[Shard], trace: Trace, rank: int, n: int, live: Sequence[int] | None, needs: Any,
    group: dist.ProcessGroup | None = None,
) -> Shard:  # fmt: skip
    sizes = (n,) * trace.ranks
    rows = slice(0, n) if live is None else slice(*live)
    return kind(group, rank, sizes, starts_of(sizes), (rows,) * trace.ranks, *needs)


def _pretended(trace: Trace, n: int, live: Sequence[int] | None = None) -> Shard:
    # Results have the same shapes on all ranks, and any rank may want gradients of y.
    return _even(Pretended, trace, 0, n, live, (True, True, True))


def _again(trace: Trace, n: int, live: Sequence[int] | None, told: Tensor) -> Shard:
    group = group_of(group_named(trace.group))
    rank = 0 if group is None else dist.get_rank(group)
    return _even(Shard, trace, rank, n, live, map(bool, told.tolist()), group)


def _beside(row: Block, own: Block) -> list[Tensor]:
    """A row's tensors, with empty ones in place of those that its own block has, too."""
    nothing = own.x.features.new_empty(0)
    both = zip(row.flat()[:TENSORS], own.flat()[:TENSORS], strict=True)
    return [nothing.new_empty(0) if t is None or t is mine else t for t, mine in both]


def _with_beside(own: Block, beside: Sequence[Tensor]) -> Block:
    flat = own.flat()
    both = zip(flat[:TENSORS], beside, strict=True)
    block, _ = Block.of((*(t if t.numel() else mine for mine, t in both), *flat[TENSORS:]))
    return block


def _leaves(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Inputs that require gradients where those in the graph did: a compiled graph's own do not."""
    return [
        t if t is None else t.detach().requires_grad_(needed)
        for t, needed in zip(inputs, needs, strict=True)
    ]


def _apart(found: Sequence[Tensor]) -> list[Tensor]:
    """No two results of an operator may share memory."""
    return [t.clone(memory_format=torch.contiguous_format) for t in found]


# ---- the loss ---------------------------------------------------------------------------------


def _loss_results(
    inputs: sharded_loss.Inputs, context: sharded_loss.Context, trace: Trace
) -> list[Tensor]:
    own = context.own(*inputs)
    row = context.row(own)
    if not trace.saves:
        return [sharded_loss.value_alone(context, row)]
    x, y = inputs[:2]
    at_once = sharded_loss.makes_gradients_at_once(context, x, y)
    value, found = sharded_loss.forward(context, row, x, y, trace.needs[0])
    beside = [] if at_once else _beside(row.block, own)
    if at_once and not context.shard.needs_y:
        # The graph was made for ranks some of which may want it.
        dx, dy, totals = found
        found = [dx, dy.new_empty((context.shard.batch, *dy.shape[1:])), totals]
    return [value, _told(context.shard), *beside, *found]


def _rank_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, *arguments: Any
) -> list[Tensor]:
    options, trace = _split(TracedOptions, arguments)
    _check_ranks(trace)
    leaves = _leaves((x, y, scale, bias), trace.needs)
    with torch.set_grad_enabled(trace.saves):
        inputs, context = begin_loss(leaves, group_named(trace.group), options.call)
    with torch.no_grad():
        return _loss_results(inputs, context, trace)


def _fake_rank_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, *arguments: Any
) -> list[Tensor]:
    options, trace = _split(TracedOptions, arguments)
    try:
        checked = check_loss((x, y, scale, bias), group_named(trace.group), options.call)
    except (TypeError, ValueError, RuntimeError):
        return [x.new_empty((), dtype=torch.float32)]
    shard = _pretended(trace, x.shape[0], checked.live)
    context = sharded_loss.Context(checked.plan, shard, options.sharing)
    return _loss_results(checked.inputs, context, trace)


def _rank_loss_backward(
    upstream: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None,
    saved: Sequence[Tensor], *arguments: Any,
) -> list[Tensor]:  # fmt: skip
    options, trace = _split(TracedOptions, arguments)
    inputs, (told, *saved) = (x, y, scale, bias), saved
    plan = LossOptions(options.kind, trace.engine, options.dtype, options.normalize, "mean", 0)
    shard = _again(trace, x.shape[0], options.live, told)
    context = sharded_loss.Context(plan, shard, options.sharing)
    block = context.own(*inputs)
    if not sharded_loss.makes_gradients_at_once(context, x, y):
        block, saved = _with_beside(block, saved[:TENSORS]), saved[TENSORS:]
    row = BlockRow(plan.engine, context.columns, plan.normalize, block)
    gradients = sharded_loss.backward(context, row, inputs, saved, trace.needs, upstream)
    return _wanted(gradients)


def _fake_rank_loss_backward(upstream: Tensor, *arguments: Any) -> list[Tensor]:
    return _like(arguments[:4], arguments)


# ---- the statistics ---------------------------------------------------------------------------


def _contrast_results(inputs: Inputs, task: Task, trace: Trace) -> list[Tensor]:
    own = sharded_statistics.own_of(inputs, task)
    row = sharded_statistics.row_of(own, task)
    # A rank's number says how many columns are before its own.
    apart = not task.ring and row.columns.apart
    budget = task.request.memory_budget if trace.saves and not apart else 0
    found, swept = sharded_statistics.forward(inputs, row, task.request, budget)
    found = _apart(found)
    if not trace.saves:
        return found
    beside = _beside(_with_codes_apart(row.block), _without_margin(own))
    kept = () if apart else swept.kept
    return [*found, _told(task.shard), *beside, swept.state, swept.positive, *kept]


def _with_codes_apart(block: Block) -> Block:
    """No two results of an operator may share memory: rows' and columns' codes are one tensor's."""
    x, y = block.x, block.y
    if x.ids is None:
        return block
    return block._replace(x=x._replace(ids=x.ids.clone()), y=y._replace(ids=y.ids.clone()))


def _without_margin(own: Block) -> Block:
    return own._replace(x=own.x._replace(threshold=None), y=own.y._replace(threshold=None))


def _given(arguments: Sequence[Any]) -> tuple[tuple[Any, ...], ContrastCall, Trace]:
    """The arguments behind a contrast's inputs: ids and margin, options, the trace."""
    x_ids, y_ids, margin, *rest = arguments
    call, trace = _split(ContrastCall, rest)
    return (None if x_ids is None else (x_ids, y_ids), margin), call, trace


def _rank_contrast(*arguments: Any) -> list[Tensor]:
    count = len(Inputs._fields)
    others, call, trace = _given(arguments[count:])
    _check_ranks(trace)
    leaves = _leaves(arguments[:count], trace.needs)
    with torch.set_grad_enabled(trace.saves):
        inputs, task = begin_contrast((*leaves, *others), group_named(trace.group), call)
    with torch.no_grad():
        return _contrast_results(inputs, task, trace)


def _fake_rank_contrast(*arguments: Any) -> list[Tensor]:
    count = len(Inputs._fields)
    others, call, trace = _given(arguments[count:])
    try:
        checked = check_contrast((*arguments[:count], *others), group_named(trace.group), call)
    except (TypeError, ValueError):
        m, n = (t.shape[0] if t.dim() else 1 for t in arguments[:2])
        dtype = state_dtype(arguments[0].device)
        sizes = (m, n, m, m, n)[: statistics_of(call.same_id == "positive")]
        return [arguments[0].new_empty((size,), dtype=dtype) for size in sizes]
    task = checked.task._replace(shard=_pretended(trace, checked.inputs.y.shape[0]))
    return _contrast_results(checked.inputs, task, trace)


def _rank_contrast_backward(upstream: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    count = len(Inputs._fields)
    inputs, (found, saved, *rest) = Inputs(*arguments[:count]), arguments[count:]
    call, trace = _split(ContrastCall, rest)
    told, beside, (state, positive, *kept) = saved[0], saved[1 : TENSORS + 1], saved[TENSORS + 1 :]
    request = StatisticsOptions(
        trace.engine, call.dtype, call.normalize, call.rows, call.columns, 0
    )
    offset = NO_POSITIVES if call.offset is None else call.offset
    shard = _again(trace, inputs.y.shape[0], None, told)
    positive_ids = call.same_id == "positive"
    task = Task(request, None, None, offset, call.kind, positive_ids, shard, call.ring)
    own = sharded_statistics.own_of(inputs, task)
    columns = sharded_statistics.columns_of(*own.sizes(), task)
    row = BlockRow(trace.engine, columns, call.normalize, _with_beside(own, beside))
    if not kept:
        nothing = KEPT_BY[trace.engine].empty(own.x.features, own.y.features, 0)
        kept = [nothing] * columns.visits
    swept = Swept(state, positive, tuple(kept))
    gradients = sharded_statistics.backward(
        inputs, row, request, found, swept, upstream, trace.needs
    )
    return _wanted(gradients)


def _fake_rank_contrast_backward(upstream: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    return _like(arguments[: len(Inputs._fields)], arguments)


# ---- operators --------------------------------------------------------------------------------


def _split(options: type[Any], arguments: Sequence[Any]) -> tuple[Any, Trace]:
    count = len(options._fields)
    return options(*arguments[:count]), Trace(*arguments[count:])


def _wanted(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    # Those of scale and bias are halves of one tensor.
    return [t.clone() if t.numel() == 1 else t for t in gradients if t is not None]


def _like(inputs: Sequence[Tensor | None], arguments: Sequence[Any]) -> list[Tensor]:
    needs = Trace(*arguments[-len(Trace._fields) :]).needs
    return [t.new_empty(t.shape) for t, needed in zip(inputs, needs, strict=True) if needed]


def _define(name: str, real: Callable[..., Any], fake: Callable[..., Any]) -> None:
    # A graph that CUDA replays would leave out what the CPU does: the agreement.
    _library.define(f"{name}{_SCHEMAS[name]}", tags=(torch.Tag.cudagraph_unsafe,))

    def run(*arguments: Any) -> list[Tensor]:
        with torch.no_grad():
            return real(*arguments)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastclip::{name}", fake, lib=_library)


def _save(count: int, results: Callable[[tuple[Any, ...]], int]) -> Callable[..., None]:
    """count: of inputs; results: how many outputs are differentiable, of the other arguments."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.arguments = inputs[count:]
        ctx.results = results(ctx.arguments)
        ctx.mark_non_differentiable(*output[ctx.results :])
        ctx.save_for_backward(*inputs[:count], *output)

    return save


def _no_second(
    gradients: list[Tensor], needs: Sequence[bool], sources: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of the inputs, refusing to be differentiated where an eager call would ask that."""
    found = iter(gradients)
    every = [next(found) if needed else None for needed in needs]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        every = refuse_second_derivative(every, *sources)
    return every


def _loss_gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    inputs, (_, *saved) = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    g, needs = upstream[0], Trace(*ctx.arguments[-len(Trace._fields) :]).needs
    with torch.no_grad():
        found = torch.ops.fastclip.rank_loss_backward(g, *inputs, saved, *ctx.arguments)
    return *_no_second(found, needs, (g, *inputs[:3])), *(None for _ in ctx.arguments)


def _contrast_gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    count = len(Inputs._fields)
    inputs, output = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    found, saved = list(output[: ctx.results]), list(output[ctx.results :])
    # All ranks make the same exchanges, whatever each uses.
    given = [torch.zeros_like(t) if g is None else g for t, g in zip(found, upstream, strict=False)]
    options = ctx.arguments[_OTHERS.count(",") + 1 :]
    with torch.no_grad():
        gradients = torch.ops.fastclip.rank_contrast_backward(
            given, *inputs, found, saved, *options
        )
    needs = Trace(*options[-len(Trace._fields) :]).needs
    sources = (*(g for g in upstream if g is not None), *inputs[:3])
    return *_no_second(gradients, needs, sources), *(None for _ in ctx.arguments)


def _results_of_contrast(arguments: tuple[Any, ...]) -> int:
    _, call, _ = _given(arguments)
    return statistics_of(call.same_id == "positive")


_library = torch.library.Library("fastclip", "FRAGMENT")
_define("rank_loss", _rank_loss, _fake_rank_loss)
_define("rank_loss_backward", _rank_loss_backward, _fake_rank_loss_backward)
_define("rank_contrast", _rank_contrast, _fake_rank_contrast)
_define("rank_contrast_backward", _rank_contrast_backward, _fake_rank_contrast_backward)
# Not by an autograd.Function: in a graph that is an operator of higher order, which DDP's optimizer
# of graphs refuses.
torch.library.register_autograd(
    "fastclip::rank_loss", _loss_gradients, setup_context=_save(4, lambda _: 1), lib=_library
)
torch.library.register_autograd(
    "fastclip::rank_contrast", _contrast_gradients,
    setup_context=_save(len(Inputs._fields), _results_of_contrast), lib=_library,
)  # fmt: skip
