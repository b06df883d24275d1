"""The options that the operators of fused losses do not have."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def needs_lines(
    ids: Any, label_smoothing: float, weights: Tensor | None, same_id: str = "ignore",
    reduction: str = "mean",
) -> bool:  # fmt: skip
    """True if a loss has such options, so that it is computed from line statistics."""
    has = ids is not None or weights is not None or label_smoothing != 0
    return has or same_id != "ignore" or reduction != "mean"


def check_no_live(live: tuple[int, int] | None) -> None:
    """Checks that a loss which is computed from line statistics differentiates all pairs."""
    if live is not None:
        raise ValueError(
            "live must be None with ids, label_smoothing, weights or, across ranks, a reduction "
            f"other than 'mean', got live={live!r}"
        )
