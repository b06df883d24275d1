"""The world of a loss whose batch is spread over ranks, for the formulas of `fastclip.formulas`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.checks import budget_of
from ..engine.compile_marks import no_compile
from ..engine.dtypes import product_dtype
from ..formulas.world import Batch, World
from ..kinds import LineStatistics
from .agreement import Call, agree, announced, group_of, ranks_of
from .calls import contrast_call, engine_of
from .collectives import gather_rows
from .compiled.total import total
from .contrast import contrast_of
from .shard import Shard


def world_of_ranks(
    loss: str, process_group: dist.ProcessGroup | None, ring: bool, uneven: bool, normalize: bool,
    backend: str | None, memory_budget: int | None,
) -> World:  # fmt: skip
    """Returns the world of a loss across ranks. loss: its name and its options (`described`), which
    must be the same on all ranks."""

    common = {
        "normalize": normalize, "ring": ring, "uneven": uneven, "backend": backend,
        "memory_budget": memory_budget, "loss": loss,
    }  # fmt: skip

    def contrast(*inputs: Any, **options: Any) -> LineStatistics:
        given, call = contrast_call(*inputs, **{**common, **options})
        return contrast_of(given, process_group, call)

    ranks = ranks_of(process_group)

    def check_engine(x: Tensor, y: Tensor) -> None:
        engine_of(backend, x, y, ranks, product_dtype(x, y), "softmax")
        budget_of(memory_budget, x.device)

    return World(
        contrast,
        check_engine,
        functools.partial(announced, process_group),
        functools.partial(total, process_group),
        functools.partial(_gather_rows, process_group, uneven),
        functools.partial(_whole_batch, process_group, uneven, normalize, loss),
        ranks,
        not uneven,
    )


@no_compile
def _whole_batch(
    process_group: dist.ProcessGroup | None, uneven: bool, normalize: bool, loss: str, x: Tensor,
    y: Tensor, ids: tuple[Tensor, Tensor] | None,
) -> Batch:  # fmt: skip
    wants = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    must_match = {
        "ids": int(ids is not None), "normalize": int(normalize),
        "dtype of products": product_dtype(x, y),
    }  # fmt: skip
    call = Call(loss, wants, uneven, must_match)
    shard = agree(process_group, x, y, call)
    x_ids, y_ids = (None, None) if ids is None else map(shard.gather, ids)
    return Batch(*_WholeBatch.apply(x, y, shard), x_ids, y_ids, shard.start)


class _WholeBatch(torch.autograd.Function):
    """The rows of all ranks, of both sides in one Function: every rank then takes part in both
    exchanges of the backward, whichever of its own sides need a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
        ctx.shard = shard
        found = [t.clone() if shard.world_size == 1 else shard.gather(t) for t in (x, y)]
        needed = shard.needs_x, shard.needs_y
        ctx.mark_non_differentiable(
            *(t for t, wanted in zip(found, needed, strict=True) if not wanted)
        )
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        shard = ctx.shard
        needed = shard.needs_x, shard.needs_y
        found = [
            shard.scatter_sum(g) if wanted else None
            for g, wanted in zip(gradients, needed, strict=True)
        ]
        return *(
            g if own else None for g, own in zip(found, ctx.needs_input_grad, strict=False)
        ), None


@no_compile
def _gather_rows(process_group: dist.ProcessGroup | None, uneven: bool, x: Tensor) -> Tensor:
    group, ranks = group_of(process_group), ranks_of(process_group)
    if ranks == 1:
        return x
    sizes = (x.shape[0],) * ranks
    if uneven:
        own = torch.tensor(sizes[:1], device=x.device)
        sizes = tuple(gather_rows(own, (1,) * ranks, group).tolist())
    return gather_rows(x.detach(), sizes, group)
