"""The world of a loss whose batch is spread over ranks, for the formulas of `fastclip.formulas`."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.beside import Given
from ..engine.compile_marks import no_compile
from ..formulas.world import Batch, World
from ..kinds import LineStatistics
from .agreement import agree, announce_failure, group_of, ranks_of
from .calls import ContrastCall
from .collectives import gather_rows
from .compiled.total import total
from .contrast import contrast_of
from .shard import Shard


def world_of_ranks(
    loss: str, process_group: dist.ProcessGroup | None, ring: bool, uneven: bool, normalize: bool,
    backend: str | None, memory_budget: int | None,
) -> World:  # fmt: skip
    """loss: its name and its options, which must be the same on all ranks."""

    def contrast(
        x: Tensor, y: Tensor | None, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None, *, offset: int | None = 0,
        labels: Tensor | None = None, ids: Any = None, same_id: str = "ignore",
        false_negative_margin: Tensor | float | None = None, key_bias: Tensor | None = None,
        rows: bool = True, columns: bool = True, means: bool = False, kind: str = "softmax",
        above: float | None = None, targets: Any = None, guide: Any = None,
        limits: Tensor | None = None, memory_budget: int | None = memory_budget,
    ) -> LineStatistics:  # fmt: skip
        others = Given(ids, false_negative_margin, labels, targets, guide, limits)
        given = (x, y, logit_scale, logit_bias, key_bias, others)
        call = ContrastCall(
            offset, same_id, rows, columns, means, targets is not None, guide is not None,
            y is None, kind, above, normalize, ring, uneven, backend, memory_budget, loss,
        )  # fmt: skip
        return contrast_of(given, process_group, call)

    def guarded(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except (TypeError, ValueError, RuntimeError):
            announce_failure(process_group)
            raise

    ranks = ranks_of(process_group)
    return World(
        contrast,
        memory_budget,
        guarded,
        functools.partial(total, process_group),
        functools.partial(_gather, process_group, uneven),
        functools.partial(_gathered, process_group, uneven, loss),
        ranks,
        not uneven,
    )


@no_compile
def _gathered(
    process_group: dist.ProcessGroup | None, uneven: bool, loss: str, x: Tensor, y: Tensor,
    ids: tuple[Tensor, Tensor] | None,
) -> Batch:  # fmt: skip
    wants = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    must_match = {f"loss with its options (here {loss})": zlib.crc32(loss.encode())}
    must_match["ids"] = int(ids is not None)
    shard = agree(process_group, x, y, wants, uneven, **must_match)
    x_ids, y_ids = (None, None) if ids is None else map(shard.gather, ids)
    x, y = _Gathered.apply(x, shard, shard.needs_x), _Gathered.apply(y, shard, shard.needs_y)
    return Batch(x, y, x_ids, y_ids, shard.start)


class _Gathered(torch.autograd.Function):
    """The rows of all ranks. Every rank takes part in the backward if any rank needs it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard, needed: bool) -> Tensor:
        ctx.shard, ctx.needed = shard, needed
        return shard.gather(x) if shard.world_size > 1 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:
        return (ctx.shard.scatter_sum(g) if ctx.needed else None), None, None


@no_compile
def _gather(process_group: dist.ProcessGroup | None, uneven: bool, x: Tensor) -> Tensor:
    group, ranks = group_of(process_group), ranks_of(process_group)
    if ranks == 1:
        return x
    sizes = (x.shape[0],) * ranks
    if uneven:
        own = torch.tensor(sizes[:1], device=x.device)
        sizes = tuple(gather_rows(own, (1,) * ranks, group).tolist())
    return gather_rows(x.detach(), sizes, group)


def described(name: str, **options: Any) -> str:
    """A loss with its options; for tensors only that they are given."""
    parts = (
        f"{key}={'given' if isinstance(value, (Tensor, tuple)) else repr(value)}"
        for key, value in options.items()
    )
    return f"{name}({', '.join(parts)})"
