"""What goes wrong on ranks in `test_distributed_failures.py`."""

import os
import signal
from typing import Any

import torch
import torch.distributed as dist

from fastclip import distributed
from fastclip.loss import ClipLoss, SigLipLoss

WIDTH = 6


def features(n: int, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, width).to(dtype).requires_grad_()


def call(rank: int, world_size: int, own: list[dict[str, Any]]) -> str:
    """The loss on what each rank brings; the error that it raises."""
    bring = dict(own[rank])
    uneven, frozen = bring.pop("uneven", False), bring.pop("frozen", False)
    normalize = bring.pop("normalize", False)
    loss, autocast = bring.pop("loss", "clip_loss"), bring.pop("autocast", False)
    dtype_y = bring.pop("dtype_y", bring.get("dtype", torch.float32))
    x, y = features(**bring), features(**{**bring, "dtype": dtype_y})
    if frozen:
        x, y = x.detach(), y.detach()
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = getattr(distributed, loss)(x, y, 2.0, -1.0, uneven=uneven, normalize=normalize)
        value.backward()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def bad_call(rank: int, world_size: int) -> str:
    """Rank 1 alone has integer features."""
    x = features(4) if rank != 1 else torch.ones(4, WIDTH, dtype=torch.int64)
    try:
        distributed.clip_loss(x, x, 2.0)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def forgotten_rank(rank: int, world_size: int) -> str:
    try:
        ClipLoss(True, True, world_size=world_size)(features(3), features(3), 1.0)
    except ValueError as error:
        return str(error)
    return "no error"


def gathered_with_one_frozen(rank: int, world_size: int) -> float:
    """The gradient of the sum of squares of all gathered features, times ranks."""
    x, y = (torch.randn(3, WIDTH, dtype=torch.float64) + rank for _ in range(2))
    x.requires_grad_()
    y.requires_grad_(rank != 1)
    every_x, every_y = distributed.gather_features(x, y, gather_with_grad=True)
    (every_x.square().sum() + every_y.square().sum()).backward()
    error = (x.grad - 2 * world_size * x).abs().max()
    if rank != 1:
        error = torch.maximum(error, (y.grad - 2 * world_size * y).abs().max())
    return float(error)


class OwnBlock(SigLipLoss):
    """Counts its blocks: 2 for its own, and 2 for each other rank's texts."""

    def _loss(self, *inputs: Any, negative_only: bool = False) -> torch.Tensor:
        return torch.tensor(2.0)


def own_block(rank: int, world_size: int) -> float:
    loss = OwnBlock(rank=rank, world_size=world_size)
    return float(loss(features(3), features(3), 1.0, None))


def zero_row_in_fp16(rank: int, world_size: int) -> bool:
    finite = True
    for ring in (False, True):
        x, y = features(4, dtype=torch.float16).detach(), features(4)
        x[1] = 0
        x.requires_grad_()
        distributed.clip_loss(x, y, 2.0, normalize=True, ring=ring).backward()
        finite &= bool(x.grad.isfinite().all()) and not x.grad[1].any()
    return finite


def module_errors(rank: int, world_size: int) -> list[str]:
    errors = []
    for loss in (ClipLoss(rank=rank, world_size=world_size + 1),
                 SigLipLoss(rank=(rank + 1) % world_size, world_size=world_size)):  # fmt: skip
        try:
            loss(features(3), features(3), 1.0, None)
        except ValueError as error:
            errors.append(str(error))
    return errors


def double_backward(rank: int, world_size: int) -> str:
    x = features(4)
    loss = distributed.clip_loss(x, features(4), 2.0)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def dies(rank: int, world_size: int) -> str:
    """Rank 0 is killed between its forward and its backward."""
    loss = distributed.clip_loss(features(5), features(5), 2.0)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        loss.backward()
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "no error"


def in_group_of_odd_ranks(rank: int, world_size: int) -> list[float] | None:
    """Ranks 1 and 3 of four share a batch; the group's ranks are 0 and 1."""
    group = dist.new_group([1, 3])
    if rank not in (1, 3):
        try:
            distributed.clip_loss(features(3), features(3), 1.0, process_group=group)
        except ValueError as error:
            return [str(error)]
        return ["no error"]
    found = []
    for ring in (False, True):
        torch.manual_seed(0)
        x, y = torch.randn(2, 8, WIDTH, dtype=torch.float64).unbind()
        own = slice(0, 4) if rank == 1 else slice(4, 8)
        mine = [t[own].clone().requires_grad_() for t in (x, y)]
        distributed.clip_loss(*mine, 3.0, process_group=group, ring=ring).backward()
        every = [t.clone().requires_grad_() for t in (x, y)]
        from fastclip.reference import clip_loss

        clip_loss(*every, 3.0).backward()
        found += [
            float((m.grad / 2 - e.grad[own]).norm() / e.grad[own].norm())
            for m, e in zip(mine, every, strict=True)
        ]
    return found
