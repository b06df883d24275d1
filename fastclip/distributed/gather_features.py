"""open_clip's `gather_features`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..engine.checks import check_features
from ..engine.compile_marks import no_compile
from .agreement import Call, agree, announce_failure, check_world
from .shard import Shard


def _all_rows(x: Tensor, shard: Shard) -> Tensor:
    """All ranks' rows in a new tensor, also for a single rank."""
    return shard.gather(x).clone() if shard.world_size == 1 else shard.gather(x)


class _Gather(torch.autograd.Function):
    """All ranks' rows. The gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return _all_rows(x, shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.scatter_sum(g), None


@no_compile
def gather_features(
    image_features: Tensor,
    text_features: Tensor,
    local_loss: bool = False,
    gather_with_grad: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    use_horovod: bool = False,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """open_clip's `gather_features`: both towers' features of all ranks, (B, D).

    With `gather_with_grad` all rows are differentiable; there is no second derivative. Without it
    only this rank's own rows are differentiable, and with `local_loss` not even those. rank and
    world_size may be left out. This function is for losses of your own: those of this library never
    hold more than one tower's features of all ranks.
    """
    alike = {"local_loss": int(local_loss), "gather_with_grad": int(gather_with_grad)}
    try:
        if use_horovod:
            raise ValueError("use_horovod must be False, got True: use torch.distributed")
        if rank is not None and world_size is not None:
            check_world("gather_features", rank, world_size, process_group)
        check_features(image_features, text_features)
    except (TypeError, ValueError):
        announce_failure(process_group)
        raise
    towers = image_features, text_features
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in towers)
    shard = agree(process_group, *towers, Call("gather_features()", wants, False, alike))
    if gather_with_grad:
        needed = (shard.needs_x and wants, shard.needs_y and wants)
        # A tower that only this rank has frozen still takes part in the others' gradients.
        towers = tuple(
            t if t.requires_grad or not needs else t.detach().requires_grad_()
            for t, needs in zip(towers, needed, strict=True)
        )
        images, texts = (_Gather.apply(t, shard) for t in towers)
        return images, texts
    gathered = [_all_rows(t.detach(), shard) for t in towers]
    if not local_loss:
        for every, own in zip(gathered, towers, strict=True):
            every[shard.mine] = own
    return gathered[0], gathered[1]
