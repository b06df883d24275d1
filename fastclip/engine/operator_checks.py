"""Checks that an operator's arguments fit together.

They serve the engines in Python, whose tensors would broadcast silently; the compiled engines have
checks of their own. They read sizes and dtypes only, so nothing waits for a device. The losses
always pass arguments that fit, so these errors are for callers of the operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kinds import kind_of
from .block import Block, Side, SweepResults, Upstream, Wanted
from .dtypes import FLOATING, accumulation_dtype, state_dtype
from .kept import Nothing, Products, Weights


def _check(holds: bool, rule: str, *got: Any, error: type[Exception] = RuntimeError) -> None:
    if not holds:
        seen = ", ".join(
            f"{tuple(g.shape)} {g.dtype}" if isinstance(g, Tensor) else repr(g) for g in got
        )
        raise error(f"{rule}, got {seen}")


def _one_element(**scalars: Tensor | None) -> None:
    for name, value in scalars.items():
        _check(value is None or value.numel() == 1, f"{name} must have one element", value)


def _vectors(
    rule: str, sides: tuple[Side, Side], name: str, dtypes: tuple[torch.dtype, ...] | None = None
) -> None:
    for side in sides:
        vector = getattr(side, name)
        fits = vector is None or vector.shape == (len(side.features),)
        fits = fits and (vector is None or dtypes is None or vector.dtype in dtypes)
        _check(fits, rule, vector)
    both = [getattr(side, name) for side in sides]
    if not name.endswith("factor"):
        _check((both[0] is None) == (both[1] is None), f"{rule}, or both None", *both)


def _block(block: Block) -> None:
    x, y = block.x.features, block.y.features
    fit = x.dim() == 2 and y.dim() == 2 and x.shape[1] == y.shape[1] and x.dtype == y.dtype
    _check(
        fit and x.numel() > 0 and y.numel() > 0,
        "x and y must be non-empty (M, D) and (N, D) of one dtype", x, y,
    )  # fmt: skip
    _check(
        x.dtype in FLOATING, "features must be float64, float32, bfloat16 or float16", x.dtype,
        error=TypeError,
    )  # fmt: skip
    sides = block.x, block.y
    _vectors("factor_x must be (M), factor_y (N)", sides, "factor")
    _vectors("ids_x must be (M), ids_y (N), int32", sides, "ids", (torch.int32,))
    _vectors(
        f"threshold_x must be (M), threshold_y (N), {accumulation_dtype(x)}", sides, "threshold",
        (accumulation_dtype(x),),
    )  # fmt: skip
    _targets(block)
    key_bias = block.key_bias
    _check(
        key_bias is None or (key_bias.shape == (len(y),) and key_bias.dtype in FLOATING),
        "key_bias must be (N), floating point", key_bias,
    )  # fmt: skip
    _check(
        not block.same_id_positive or block.x.ids is not None,
        "positives by id need ids_x and ids_y", block.x.ids,
    )  # fmt: skip
    _one_element(scale=block.scale, bias=block.bias, target_scale=block.target_scale)
    _check(
        not (kind_of(block.kind).has_levels and block.same_id_positive),
        "a kind with levels must have no positives by id", block.kind, error=ValueError,
    )  # fmt: skip


def _levels(block: Block, levels: Tensor | None) -> None:
    if not kind_of(block.kind).has_levels:
        _check(levels is None, "levels must be None for a kind without levels", levels)
        return
    _check(
        levels is not None
        and levels.shape == (sum(block.sizes()),)
        and levels.dtype == state_dtype(levels.device),
        "levels must be (M + N) float64 for a kind with levels", levels,
    )  # fmt: skip


def _targets(block: Block) -> None:
    sides = block.x, block.y
    both = [side.target for side in sides]
    lines = [
        (
            t.dim() == 2 and len(t) == len(side.features) and t.numel() > 0
            and t.dtype == side.features.dtype
        )
        for t, side in zip(both, sides, strict=True) if t is not None
    ]  # fmt: skip
    _check(
        all(lines) and (not lines or (len(lines) == 2 and both[0].shape[1] == both[1].shape[1])),
        "target_x must be (M, D'), target_y (N, D') of the features' dtype, or both None", *both,
    )  # fmt: skip
    _vectors("target_factor_x must be (M), target_factor_y (N)", sides, "target_factor")
    _check(
        bool(lines) == (block.guided != block.has_teacher()),
        "targets must be a guide (guided) or a teacher (target_scale), not both",
        both[0], block.guided, block.target_scale,
    )  # fmt: skip
    _check(
        not block.guided or block.x.threshold is not None,
        "a guide needs threshold_x and threshold_y", block.x.threshold,
    )  # fmt: skip


def check_sweep(
    block: Block, bound: Tensor | None, occupied: Tensor | None, levels: Tensor | None, keep: int
) -> None:
    _block(block)
    _levels(block, levels)
    _one_element(bound=bound)
    shape = (2 if block.same_id_positive else 1, sum(block.sizes()))
    _check(
        occupied is None or (occupied.shape == shape and occupied.dtype == torch.bool),
        "occupied must be (1, M + N), with positives by id (2, M + N), bool", occupied,
    )  # fmt: skip
    _check(keep >= 0, "keep must be a number of rows >= 0", keep)


def check_finish(
    state: Tensor, positive: Tensor, scale: Tensor, bias: Tensor | None, kind: str
) -> None:
    lines, period = state.shape[-1], positive.numel()
    _check(
        state.dim() == 2 and len(state) == 2 and period > 0 and lines % period == 0
        and state.dtype == positive.dtype == state_dtype(state.device),
        "state must be (2, L) and positive (P), P a divisor of L, float64", state, positive,
    )  # fmt: skip
    _one_element(scale=scale, bias=bias)
    _check(
        not kind_of(kind).has_levels, "a kind with levels must not be finished", kind,
        error=ValueError,
    )  # fmt: skip


def check_weigh(
    block: Block, statistics: SweepResults, upstream: Upstream, wanted: Wanted,
    kept_as: type[Products | Nothing | Weights],
) -> None:  # fmt: skip
    _block(block)
    x, y = block.x.features, block.y.features
    m, n = block.sizes()
    state, positive, kept = statistics
    coefficients, positive_weight, gain = upstream
    rows = block.state_rows()
    fit = state.shape == (rows, m + n) and state.dtype == state_dtype(x.device)
    fit = fit and coefficients.shape == ((rows // 2, m + n) if rows > 2 else (m + n,))
    _check(
        fit and positive.shape == (m,) and positive_weight.shape == (m,),
        "state must be (2, M + N) float64, coefficients (M + N), positive and positive_weight (M); "
        "with positives by id state (4, M + N), coefficients (2, M + N); with a teacher 3 more "
        "rows and 1 more",
        state, coefficients, positive, positive_weight,
    )  # fmt: skip
    _check(
        kept.is_contiguous() and (kept.numel() == 0 or kept_as.made(x, y, kept)),
        "kept must come from a sweep of the same features", kept,
    )  # fmt: skip
    fit = wanted.dtype_x in FLOATING and wanted.dtype_y in FLOATING
    _check(
        fit, "gradients are float64, float32, bfloat16 or float16", wanted.dtype_x, wanted.dtype_y,
        error=TypeError,
    )  # fmt: skip
    _one_element(gain=gain)


def check_sweep_and_weigh(
    block: Block, gain: Tensor, needs_x: bool, needs_y: bool, project: bool
) -> None:
    _block(block)
    _one_element(gain=gain)
    _check(
        kind_of(block.kind).is_linear,
        "kind must have weights that need no state, to be swept and weighed in one go", block.kind,
        error=ValueError,
    )  # fmt: skip
    _check(
        block.is_plain,
        "a block that is swept and weighed in one go must have no ids, thresholds, key_bias or "
        "targets",
        block.x.ids, block.x.threshold, block.key_bias, block.x.target,
    )  # fmt: skip
