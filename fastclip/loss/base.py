"""Losses in one process: the entry of fused ones, and the world of those that are formulas."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from ..contrast import contrast
from ..distributed.gradient_mode import GradientMode
from ..distributed.shard import shard_of_one
from ..distributed.sharded_loss import sharded_loss
from ..engine.backends import choose
from ..engine.checks import budget_of, check_features, check_live, check_reduction, scalar
from ..engine.compile_marks import no_compile
from ..engine.dtypes import product_dtype
from ..engine.fused_loss import LossOptions, fused_loss
from ..formulas.world import World


def paired_loss(
    kind: str, dense: Callable[..., Tensor], x: Tensor, y: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None, normalize: bool, reduction: str, backend: str | None,
    memory_budget: int | None, live: tuple[int, int] | None,
) -> Tensor:  # fmt: skip
    """Returns the loss of a kind. `dense` computes it if the engine is "reference". The other
    arguments, and the errors, are those of `clip_loss`."""
    check_features(x, y)
    y = y if y is not x else y.view_as(y)  # an autograd Function needs distinct tensor objects
    check_reduction(reduction)
    scale = scalar("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else scalar("logit_bias", logit_bias, x)
    dtype = product_dtype(x, y)
    budget = budget_of(memory_budget, x.device)
    engine = choose(backend, x.device, dtype, x.shape[0] * y.shape[0], x.shape[1])
    if live is not None:
        live = check_live(live, x.shape[0])
        if reduction == "none" or engine == "reference":
            raise ValueError(
                'live pairs must be reduced to "mean" or "sum" by a fused engine, got '
                f"reduction={reduction!r}, backend={backend!r}"
            )
        options = LossOptions(kind, engine, dtype, normalize, "mean", budget)
        value = _live_loss(x, y, scale, bias, options, live)
        return value * x.shape[0] if reduction == "sum" else value
    if engine == "reference":
        return dense(x, y, scale, bias, normalize=normalize, reduction=reduction)
    options = LossOptions(kind, engine, dtype, normalize, reduction, budget)
    return fused_loss(x, y, scale, bias, options)


def one_process(normalize: bool, backend: str | None, memory_budget: int | None) -> World:
    """The world of a loss in one process. With the backend "reference" its statistics are dense."""
    options = {"normalize": normalize, "backend": backend, "memory_budget": memory_budget}

    def check_engine(x: Tensor, y: Tensor) -> None:
        choose(backend, x.device, product_dtype(x, y), x.shape[0] * y.shape[0], x.shape[1])
        budget_of(memory_budget, x.device)

    return World(functools.partial(contrast, **options), check_engine)


@no_compile
def _live_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, options: LossOptions,
    live: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Runs the loss across ranks with a single rank: only that loss can differentiate some of the
    rows alone."""
    return sharded_loss(x, y, scale, bias, options, shard_of_one(x, y, live), GradientMode())
