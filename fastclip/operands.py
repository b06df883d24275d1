"""What operators refuse, arguments that do not fit together; the dtypes that follow from operands.

For the engines in Python, whose tensors would broadcast where the compiled ones refuse; sizes and
dtypes only, so nothing waits for a device. The losses make arguments that fit: who sees an error
from here composes the operators himself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .epilogues import EPILOGUES
from .kept import Nothing, Products, Weights

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def state_dtype(device: torch.device) -> torch.dtype:
    """float64, O(M + N) numbers; float32 on Apple GPUs, which have nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 features, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(holds: bool, rule: str, *got: Any, error: type[Exception] = RuntimeError) -> None:
    if not holds:
        seen = ", ".join(
            f"{tuple(g.shape)} {g.dtype}" if isinstance(g, Tensor) else repr(g) for g in got
        )
        raise error(f"{rule}, got {seen}")


def _one_element(**scalars: Tensor | None) -> None:
    for name, value in scalars.items():
        _check(value is None or value.numel() == 1, f"{name} must have one element", value)


def _loss(name: str) -> None:
    if name not in EPILOGUES:
        known = " or ".join(repr(known) for known in EPILOGUES)
        raise ValueError(f"loss must be {known}, got {name!r}")


def _block(
    x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None, scale: Tensor,
    bias: Tensor | None,
) -> None:  # fmt: skip
    fit = x.dim() == 2 and y.dim() == 2 and x.shape[1] == y.shape[1] and x.dtype == y.dtype
    _check(
        fit and x.numel() > 0 and y.numel() > 0,
        "x and y must be non-empty (M, D) and (N, D) of one dtype", x, y,
    )  # fmt: skip
    _check(
        x.dtype in FLOATING, "features must be float64, float32, bfloat16 or float16", x.dtype,
        error=TypeError,
    )  # fmt: skip
    for factor, lines in ((factor_x, len(x)), (factor_y, len(y))):
        _check(
            factor is None or factor.shape == (lines,), "factor_x must be (M), factor_y (N)", factor
        )
    _one_element(scale=scale, bias=bias)


def sweep(*arguments: Any) -> None:
    *block, bound, _, loss, keep = arguments
    _block(*block)
    _one_element(bound=bound)
    _loss(loss)
    _check(keep >= 0, "keep must be a number of rows >= 0", keep)


def finish(state: Tensor, positive: Tensor, scale: Tensor, bias: Tensor | None, loss: str) -> None:
    lines, period = state.shape[-1], positive.numel()
    _check(
        state.dim() == 2 and len(state) == 2 and period > 0 and lines % period == 0
        and state.dtype == positive.dtype == state_dtype(state.device),
        "state must be (2, L) and positive (L) or a divisor, float64", state, positive,
    )  # fmt: skip
    _one_element(scale=scale, bias=bias)
    _loss(loss)


def weigh(*arguments: Any, plan: type[Products | Nothing | Weights]) -> None:
    *block, state, positive, coefficients, positive_weight, gain, kept, _, loss = arguments[:14]
    *_, dtype_x, dtype_y = arguments
    _block(*block)
    x, y = block[:2]
    m, n = len(x), len(y)
    fit = state.shape == (2, m + n) and state.dtype == state_dtype(x.device)
    fit = fit and coefficients.shape == (m + n,)
    _check(
        fit and positive.shape == (m,) and positive_weight.shape == (m,),
        "state must be (2, M + N) float64, coefficients (M + N), positive and positive_weight (M)",
        state, coefficients, positive, positive_weight,
    )  # fmt: skip
    _check(
        kept.is_contiguous() and (kept.numel() == 0 or plan.made(x, y, kept)),
        "kept must come from a sweep of the same features", kept,
    )  # fmt: skip
    fit = dtype_x in FLOATING and dtype_y in FLOATING
    _check(
        fit, "gradients are float64, float32, bfloat16 or float16", dtype_x, dtype_y,
        error=TypeError,
    )  # fmt: skip
    _one_element(gain=gain)
    _loss(loss)


def sweep_and_weigh(*arguments: Any) -> None:
    *block, gain, _, loss = arguments[:9]
    _block(*block)
    _one_element(gain=gain)
    _loss(loss)
    _check(
        not EPILOGUES[loss].needs_state,
        "only a loss whose weights need no state can be swept and weighed in one go", loss,
        error=ValueError,
    )  # fmt: skip
