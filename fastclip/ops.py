"""The engine's operators: schemas, fakes, and the table of engines.

Two sweeps over a rectangular block, and both in one go for a loss whose weights need no state;
between them a finish of O(M + N).

`sweep(x, y, factor_x, factor_y, scale, bias, bound, offset, loss, keep) -> state, positive, kept`
    Streams the logits `s_ij = scale * t_ij + bias`, `t_ij = <x_i, y_j> * factor_x_i * factor_y_j`,
    once, and returns what each row and column remembers of its negatives.

    x (M, D), y (N, D): features of one dtype, float64, float32, bfloat16 or float16.
    factor_x (M), factor_y (N): 1 / norm, or None for features that are taken as they are.
    scale, bias: one element each; bias may be None.
    bound: one element, an upper bound of `|t_ij|`, or None: the engine finds one.
    offset: the positive of row i is column i + offset, where that lies in the block.
    loss: "softmax" or "sigmoid".
    keep: how many rows to keep for `weigh`, along the longer side; what is not kept is recomputed
    (`kept.py`).

    state (2, M + N), float64: rows first, then columns. softmax: references in log2 units and
    sums of `2^(s_ij * log2(e) - reference)`; sigmoid: zeros and sums of `softplus(s_ij)`.
    positive (M), float64: t of the positives, NaN for a row whose positive is not in the block.
    kept: opaque, for `weigh` on the same x, y and scale.

`finish(state, positive, scale, bias, loss) -> losses, coefficients, weights`
    Finishes lines, rows or columns: O(L), float64.

    state (2, L); positive (L), or fewer that repeat: rows and columns of a square block share them.
    losses (L), coefficients (L), weights (L) of the positives. A pair counts half its row's and
    half its column's loss.

`weigh(x, y, factor_x, factor_y, scale, bias, state, positive, coefficients, positive_weight, gain,
       kept, offset, loss, needs_x, needs_y, project, dtype_x, dtype_y) -> dx, dy, dbias_dscale`
    Streams the logits again: `w_ij = activation(s_ij) * (a_i + b_j)` for the negatives, the given
    weight for the positives.

    coefficients (M + N): a, then b. positive_weight (M). gain: one element, multiplies everything.
    dx (M, D) = gain * scale * w @ (factor_y * y), dy (N, D) = gain * scale * w.T @ (factor_x * x),
    in the dtypes asked for; (0, D) where not needed. `project` makes them gradients with respect to
    the features before they were normalised by the factors.
    dbias_dscale (2), float64: gain times the sums of w and of w * t.

`sweep_and_weigh(x, y, factor_x, factor_y, scale, bias, gain, offset, loss, needs_x, needs_y,
                 project) -> state, positive, dx, dy, dbias_dscale`
    Both, with `a_i + b_j = 1`. dx and dy have at least float32.

Each engine is an overload: `torch.ops.fastclip.sweep.cpu` and `.cuda` (C++), `.torch`
(`chunked.py`), `.triton` (`triton_kernels/`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import operands
from .kept import PLANS, Products, Weights
from .operands import accumulation_dtype, state_dtype

_BLOCK = "Tensor x, Tensor y, Tensor? factor_x, Tensor? factor_y, Tensor scale, Tensor? bias"
SCHEMAS = {
    "sweep": f"({_BLOCK}, Tensor? bound, int offset, str loss, SymInt keep)"
    " -> (Tensor state, Tensor positive, Tensor kept)",
    "finish": "(Tensor state, Tensor positive, Tensor scale, Tensor? bias, str loss)"
    " -> (Tensor losses, Tensor coefficients, Tensor weights)",
    "weigh": f"({_BLOCK}, Tensor state, Tensor positive, Tensor coefficients,"
    " Tensor positive_weight, Tensor gain, Tensor kept, int offset, str loss, bool needs_x,"
    " bool needs_y, bool project, ScalarType dtype_x, ScalarType dtype_y)"
    " -> (Tensor dx, Tensor dy, Tensor dbias_dscale)",
    "sweep_and_weigh": f"({_BLOCK}, Tensor gain, int offset, str loss, bool needs_x, bool needs_y,"
    " bool project) -> (Tensor state, Tensor positive, Tensor dx, Tensor dy, Tensor dbias_dscale)",
}

# Each an overload of every operator.
ENGINES = ("cpu", "cuda", "torch", "triton")

_library = torch.library.Library("fastclip", "DEF")


def _fake_states(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(x.device)
    m, n = x.shape[0], y.shape[0]
    return x.new_empty((2, m + n), dtype=dtype), x.new_empty((m,), dtype=dtype)


def _fake_sweep(
    x: Tensor, y: Tensor, factor_x: Any, factor_y: Any, scale: Tensor, bias: Any, bound: Any,
    offset: int, loss: str, keep: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return *_fake_states(x, y), Products.empty(x, y, keep)


def _fake_sweep_of_weights(x: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_states(x, y), Weights.empty(x, y, others[-1])


def _fake_finish(
    state: Tensor, positive: Tensor, scale: Tensor, bias: Any, loss: str
) -> tuple[Tensor, Tensor, Tensor]:
    lines = state.shape[1]
    return state.new_empty((lines,)), state.new_empty((lines,)), state.new_empty((lines,))


def _fake_weigh(
    x: Tensor, y: Tensor, factor_x: Any, factor_y: Any, scale: Tensor, bias: Any, state: Tensor,
    positive: Tensor, coefficients: Tensor, positive_weight: Tensor, gain: Tensor, kept: Tensor,
    offset: int, loss: str, needs_x: bool, needs_y: bool, project: bool, dtype_x: torch.dtype,
    dtype_y: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty((x.shape[0] if needs_x else 0, x.shape[1]), dtype=dtype_x)
    dy = y.new_empty((y.shape[0] if needs_y else 0, y.shape[1]), dtype=dtype_y)
    return dx, dy, x.new_empty((2,), dtype=state_dtype(x.device))


def _fake_sweep_and_weigh(
    x: Tensor, y: Tensor, factor_x: Any, factor_y: Any, scale: Tensor, bias: Any, gain: Tensor,
    offset: int, loss: str, needs_x: bool, needs_y: bool, project: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulation_dtype(x)
    dx = x.new_empty((x.shape[0] if needs_x else 0, x.shape[1]), dtype=dtype)
    dy = y.new_empty((y.shape[0] if needs_y else 0, y.shape[1]), dtype=dtype)
    return *_fake_states(x, y), dx, dy, x.new_empty((2,), dtype=state_dtype(x.device))


_FAKES = {
    "sweep": _fake_sweep,
    "finish": _fake_finish,
    "weigh": _fake_weigh,
    "sweep_and_weigh": _fake_sweep_and_weigh,
}

for _engine in ENGINES:
    for _name, _schema in SCHEMAS.items():
        _fake = _FAKES[_name]
        if _name == "sweep" and PLANS[_engine] is Weights:
            _fake = _fake_sweep_of_weights
        _library.define(f"{_name}.{_engine}{_schema}")
        torch.library.register_fake(f"fastclip::{_name}.{_engine}", _fake, lib=_library)


def implement(engine: str, module: ModuleType) -> None:
    """Registers an engine written in Python. Like the compiled ones it has no derivative."""

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"fastclip's operators (engine {engine!r}) have no derivative of their own: "
            "call the losses of fastclip.loss"
        )

    def isolated(name: str) -> Callable[..., Any]:
        implementation, check = getattr(module, name), getattr(operands, name)
        if name == "weigh":
            check = functools.partial(check, plan=PLANS[engine])

        # The caller's autocast would reach into the engine's own products and round its logits.
        @functools.wraps(implementation)
        def run(*args: Any) -> Any:
            with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
                check(*args)
                return implementation(*args)

        return run

    for name in SCHEMAS:
        _library.impl(f"{name}.{engine}", isolated(name), "CompositeExplicitAutograd")
        torch.library.register_autograd(f"fastclip::{name}.{engine}", refuse, lib=_library)
