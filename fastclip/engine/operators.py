"""The engine's operators: schemas, fakes, and the table of engines.

`sweep` and `weigh` stream a rectangular block of logits; `finish`, O(M + N), lies between them.
`sweep_and_weigh` is both in one go, for a loss whose weights are known before the sweep. `block.py`
has the bundles of their arguments.

A block (`block.Block`) has the logits `s_ij = scale * t_ij + bias + key_bias_j` with
`t_ij = <x_i, y_j> * factor_x_i * factor_y_j`, and says which pairs count. A line is a row or a
column.

    x (M, D), y (N, D): features of one dtype, float64, float32, bfloat16 or float16.
    factor_x (M), factor_y (N): 1 / norm, or None for 1.
    ids_x (M), ids_y (N): int32, or None. Pairs with equal ids are not negatives.
    threshold_x (M), threshold_y (N): in the dtype that t is accumulated in, or None. A negative
    with a larger t is left out of that line, but not of its other line.
    target_x (M, D'), target_y (N, D'): features of a second pair of towers in the same dtype, or
    None. `t'_ij = <target_x_i, target_y_j> * target_factor_x_i * target_factor_y_j`. They get no
    gradients.
    target_factor_x (M), target_factor_y (N): 1 / norm, or None for 1.
    scale, bias: one element each; bias may be None.
    key_bias (N): of a floating dtype, or None; -inf takes a column out.
    target_scale: one element, which makes the targets a teacher: pair ij has the weight
    `e'_ij = 2^(target_scale * t'_ij * log2(e) - shift')`. All pairs have one: own positives, pairs
    with equal ids, pairs that a threshold or a key_bias leaves out.
    offset: the own positive of row i is column i + offset, if the block has that column. It is not
    a negative, whatever ids and thresholds say.
    kind: a name in `kinds.KINDS`.
    same_id_positive: pairs with equal ids are positives of their row and their column.
    guided: the targets are a guide, without a target_scale: t'_ij is compared with the thresholds
    instead of t_ij.

`sweep(BLOCK, bound, occupied, levels, keep) -> state, positive, kept`
    Streams the logits once and returns the state of each line.

    bound: one element, an upper bound of `|t_ij|`, or None: the engine computes one.
    occupied: bool (1, M + N), the lines that have any negatives; (2, M + N) with same_id_positive,
    the second row for lines that have any positives by id. Thresholds are not considered. None: the
    offset decides. If the sum of an occupied line is too small for the common shift, the engine
    recomputes it with a shift of its own.
    levels: (M + N) float64 in log2 units, rows first; for a kind with levels, None for others. Such
    a kind needs neither bound nor occupied, and takes no same_id_positive.
    keep: how many lines of the longer side to keep for `weigh`, with all their pairs (`kept.py`);
    `weigh` recomputes the rest.

    state (2, M + N), float64: rows first, then columns. softmax: shifts in log2 units, and sums of
    `2^(s_ij * log2(e) - shift)` over the negatives; sigmoid: zeros, and sums of `softplus(s_ij)`;
    hinge: how many negatives lie above the line's level, and sums of how far they do.
    With same_id_positive (4, M + N): the last two rows are the same for the positives by id without
    the own ones; there sigmoid sums `softplus(-s_ij)`. A teacher adds three rows at the end:
    shift', the sums of e'_ij, and those of `e'_ij * t_ij`.
    positive (M), float64: t of the own positives, NaN for a row without one.
    kept: opaque, for `weigh` on the same block.

`finish(state, positive, scale, bias, kind) -> losses, coefficients, weights`
    Turns the states of L lines into losses: O(L), float64.

    state (2, L); positive (P), where P divides L and line l has positive l % P: the rows and the
    columns of a square block share their positives.
    losses (L), coefficients (L), weights (L) of the positives. The loss of a pair is half its row's
    plus half its column's.

`weigh(BLOCK, state, positive, kept, coefficients, positive_weight, gain, needs_x, needs_y,
       needs_key_bias, project, dtype_x, dtype_y) -> dx, dy, dbias_dscale, dkey_bias`
    Streams the logits again, with these weights w_ij of pairs:

        negatives: `activation(s_ij) * (a_i + b_j)`, without a_i or b_j if a threshold leaves the
            pair out of that line
        positives by id: `activation(s_ij) * (c_i + d_j)`, or `-activation(-s_ij) * (c_i + d_j)` in
            a kind that negates them
        own positives: positive_weight
        all pairs, in addition: `e'_ij * c'_i + e'_ij * d'_j`, each relative to its line's shift'

    state: the sweep's; for a kind with levels, these take the place of the first row, and the
    second is not read. In kinds with shifts or levels the activation is relative to each line's:
    `activation(s_ij, i) * a_i + activation(s_ij, j) * b_j`.
    coefficients (M + N): a, then b; with same_id_positive (2, M + N): c, then d in the second row.
    A teacher adds a row at the end: c', then d'.
    positive_weight (M). gain: one element that multiplies all results.
    dx (M, D) = gain * scale * w @ (factor_y * y), dy (N, D) = gain * scale * w.T @ (factor_x * x),
    in dtype_x and dtype_y; (0, D) if not needed. `project` makes them gradients with respect to the
    features before the factors normalised them.
    dbias_dscale (2), float64: gain times the sums of w and of w * t.
    dkey_bias (N), float64: gain times the sums of w over the rows; (0) if not needed.

`sweep_and_weigh(BLOCK, gain, needs_x, needs_y, project) -> state, positive, dx, dy, dbias_dscale`
    Sweeps and weighs with `a_i + b_j = 1` a block without ids, thresholds, key_bias and targets. dx
    and dy are float32, or float64 for float64 features.

Each engine is an overload of every operator: `torch.ops.fastclip.sweep.cpu` and `.cuda` (C++),
`.torch` (`torch_engine.py`), `.triton` (`triton_kernels/`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import flops, operator_checks
from .block import Block, Side, SweepResults, Upstream, Wanted
from .dtypes import accumulation_dtype, state_dtype
from .kept import KEPT_BY
from .namespace import NAMESPACE, OPS

SCHEMAS = {
    "sweep": f"({Block.SCHEMA}, Tensor? bound, Tensor? occupied, Tensor? levels,"
    " SymInt keep)"
    f" -> ({SweepResults.SCHEMA})",
    "finish": "(Tensor state, Tensor positive, Tensor scale, Tensor? bias, str kind)"
    " -> (Tensor losses, Tensor coefficients, Tensor weights)",
    "weigh": f"({Block.SCHEMA}, {SweepResults.SCHEMA}, {Upstream.SCHEMA}, {Wanted.SCHEMA})"
    " -> (Tensor dx, Tensor dy, Tensor dbias_dscale, Tensor dkey_bias)",
    "sweep_and_weigh": f"({Block.SCHEMA}, Tensor gain, bool needs_x, bool needs_y, bool project)"
    " -> (Tensor state, Tensor positive, Tensor dx, Tensor dy, Tensor dbias_dscale)",
}

# The overloads of every operator.
ENGINES = ("cpu", "cuda", "torch", "triton")

_library = torch.library.Library(NAMESPACE, "DEF")


class Gradients(NamedTuple):
    """The results of `weigh`."""

    x: Tensor
    y: Tensor
    bias_scale: Tensor
    key_bias: Tensor


def operator(name: str, engine: str) -> Callable[..., Any]:
    return getattr(getattr(OPS, name), engine)


def _register_flops() -> None:
    if not torch.compiler.is_compiling():
        flops.register_formulas()


def sweep(
    engine: str, block: Block, bound: Tensor | None = None, occupied: Tensor | None = None,
    keep: int = 0, levels: Tensor | None = None,
) -> SweepResults:  # fmt: skip
    _register_flops()
    return SweepResults(*operator("sweep", engine)(*block.flat(), bound, occupied, levels, keep))


def weigh(
    engine: str, block: Block, statistics: SweepResults, upstream: Upstream, wanted: Wanted
) -> Gradients:
    return Gradients(*operator("weigh", engine)(*block.flat(), *statistics, *upstream, *wanted))


def sweep_and_weigh(
    engine: str, block: Block, gain: Tensor, needs_x: bool, needs_y: bool, project: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _register_flops()
    return operator("sweep_and_weigh", engine)(*block.flat(), gain, needs_x, needs_y, project)


def finish(
    engine: str, state: Tensor, positive: Tensor, scale: Tensor, bias: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    return operator("finish", engine)(state, positive, scale, bias, kind)


def _fake_statistics(block: Block) -> tuple[Tensor, Tensor]:
    m, n = block.sizes()
    x = block.x.features
    dtype = state_dtype(x.device)
    return x.new_empty((block.state_rows(), m + n), dtype=dtype), x.new_empty((m,), dtype=dtype)


def _fake_sweep(
    engine: str, block: Block, bound: Any, occupied: Any, levels: Any, keep: int
) -> SweepResults:
    kept = KEPT_BY[engine].empty(block.x.features, block.y.features, keep)
    return SweepResults(*_fake_statistics(block), kept)


def _fake_finish(
    engine: str, state: Tensor, positive: Tensor, scale: Tensor, bias: Any, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    lines = state.shape[1]
    return state.new_empty((lines,)), state.new_empty((lines,)), state.new_empty((lines,))


def _fake_gradient(side: Side, needed: bool, dtype: torch.dtype) -> Tensor:
    lines, width = side.features.shape
    return side.features.new_empty((lines if needed else 0, width), dtype=dtype)


def _fake_weigh(
    engine: str, block: Block, statistics: SweepResults, upstream: Upstream, wanted: Wanted
) -> Gradients:
    x, dtype = block.x.features, state_dtype(block.x.features.device)
    return Gradients(
        _fake_gradient(block.x, wanted.x, wanted.dtype_x),
        _fake_gradient(block.y, wanted.y, wanted.dtype_y),
        x.new_empty((2,), dtype=dtype),
        x.new_empty((block.sizes()[1] if wanted.key_bias else 0,), dtype=dtype),
    )


def _fake_sweep_and_weigh(
    engine: str, block: Block, gain: Tensor, needs_x: bool, needs_y: bool, project: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(block.x.features)
    dx, dy = _fake_gradient(block.x, needs_x, dtype), _fake_gradient(block.y, needs_y, dtype)
    totals = block.x.features.new_empty((2,), dtype=state_dtype(dx.device))
    return *_fake_statistics(block), dx, dy, totals


_FAKES: dict[str, Callable[..., Any]] = {
    "sweep": _fake_sweep,
    "finish": _fake_finish,
    "weigh": _fake_weigh,
    "sweep_and_weigh": _fake_sweep_and_weigh,
}
# The bundles that follow the block in an operator's arguments.
_BUNDLES: dict[str, tuple[Any, ...]] = {"weigh": (SweepResults, Upstream, Wanted)}


def _bundled(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Puts an operator's arguments into the bundles that Python engines take."""
    if name == "finish":
        return arguments
    block, rest = Block.of(arguments)
    bundles = []
    for bundle in _BUNDLES.get(name, ()):
        count = len(bundle._fields)
        bundles.append(bundle(*rest[:count]))
        rest = rest[count:]
    return block, *bundles, *rest


def _looped(name: str, engine: str) -> Callable[..., Any]:
    """The rule of torch.vmap: one call for each sample, since each fills the device."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        def sample(index: int) -> tuple[Tensor, ...]:
            given = (
                a if dim is None else a.select(dim, index)
                for a, dim in zip(arguments, in_dims, strict=True)
            )
            return operator(name, engine)(*given)

        results = [sample(index) for index in range(info.batch_size)]
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _declare(name: str, engine: str) -> None:
    qualified = f"{name}.{engine}"
    _library.define(f"{qualified}{SCHEMAS[name]}")

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_FAKES[name](engine, *_bundled(name, arguments)))

    torch.library.register_fake(f"{NAMESPACE}::{qualified}", fake, lib=_library)
    torch.library.register_vmap(f"{NAMESPACE}::{qualified}", _looped(name, engine), lib=_library)


for _engine in ENGINES:
    for _name in SCHEMAS:
        _declare(_name, _engine)


def implement(engine: str, module: ModuleType) -> None:
    """Registers an engine written in Python. Its operators, like the compiled ones, have no
    derivative."""

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"fastclip's operators (engine {engine!r}) have no derivative of their own: "
            "call the losses of fastclip.loss"
        )

    def isolated(name: str) -> Callable[..., Any]:
        implementation, check = getattr(module, name), getattr(operator_checks, f"check_{name}")
        if name == "weigh":
            check = functools.partial(check, kept_as=KEPT_BY[engine])

        # The caller's autocast would apply to the engine's own products and round its logits.
        @functools.wraps(implementation)
        def run(*arguments: Any) -> Any:
            with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False):
                bundles = _bundled(name, arguments)
                check(*bundles)
                return tuple(implementation(*bundles))

        return run

    for name in SCHEMAS:
        _library.impl(f"{name}.{engine}", isolated(name), "CompositeExplicitAutograd")
        torch.library.register_autograd(f"{NAMESPACE}::{name}.{engine}", refuse, lib=_library)
