"""Dense logits of open_clip's classes, the check for subclasses that make their own, and the dense
form for `torch.jit.trace`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def overrides(loss: nn.Module, base: type[nn.Module], others: tuple[str, ...] = ()) -> bool:
    """True if a subclass makes its own logits or labels, so that the loss must be dense."""
    return any(
        getattr(type(loss), name) is not getattr(base, name)
        for name in ("get_logits", "get_ground_truth", *others)
    )


def open_clip_logits(
    x: Tensor, y: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None
) -> Tensor:
    """The logits (N, N) as open_clip computes them, in the dtype of the features."""
    logits = logit_scale * x @ y.T
    return logits if logit_bias is None else logits + logit_bias


def refuse_options(where: str, **given: bool) -> None:
    """Raises for options that a dense loss does not have. given: True for those that are set."""
    found = [name for name, is_set in given.items() if is_set]
    if found:
        raise ValueError(
            f"{', '.join(given)} must have their defaults for {where}, got another "
            f"{', '.join(found)}"
        )


def refuse_live(live: tuple[int, int] | None) -> None:
    """Raises for live pairs, which a dense loss does not support."""
    if live is not None:
        raise ValueError(
            f"live must be None for a loss that makes its own logits or labels, got {live!r}"
        )


def backend_in_trace(backend: str | None) -> str | None:
    """The backend of a call in one process: "reference" in `torch.jit.trace`, whose graphs cannot
    hold a fused backward. The check of a trace calls without gradients, and must find one graph."""
    tracing = not torch.compiler.is_compiling() and torch.jit.is_tracing()
    return "reference" if tracing else backend
