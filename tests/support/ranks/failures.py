"""Calls that fail on ranks, for `test_distributed_failures.py`."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from fastclip import distributed, reference
from fastclip.distributed import agreement
from fastclip.distributed import losses as losses_module
from fastclip.loss import ClipLoss, SigLipLoss

WIDTH = 6


def features(n: int, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, width).to(dtype).requires_grad_()


def call(rank: int, world_size: int, by_rank: list[dict[str, Any]]) -> str:
    """The error of the loss with this rank's arguments."""
    options = dict(by_rank[rank])
    uneven, frozen = options.pop("uneven", False), options.pop("frozen", False)
    normalize = options.pop("normalize", False)
    loss, autocast = options.pop("loss", "clip_loss"), options.pop("autocast", False)
    given = options.pop("given", {})
    dtype_y = options.pop("dtype_y", options.get("dtype", torch.float32))
    x, y = features(**options), features(**{**options, "dtype": dtype_y})
    if frozen:
        x, y = x.detach(), y.detach()
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scalars = () if loss == "ranking_loss" else (2.0, -1.0)
            value = getattr(distributed, loss)(
                x, y, *scalars, uneven=uneven, normalize=normalize, **given
            )
        value.sum().backward()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def error_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The type and message of the error that a call raises, or "no error"."""
    try:
        function(*arguments, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def call_module(rank: int, world_size: int, by_rank: list[dict[str, Any]]) -> str:
    """The error of `ClipLoss`, or of another class, with this rank's options. "ids" is one of the
    call."""
    options = dict(by_rank[rank])
    ids, name = options.pop("ids", None), options.pop("module", ClipLoss)
    module = name(rank=rank, world_size=world_size, **{"gather_with_grad": True, **options})
    return error_of(module, features(4), features(4), 2.0, -1.0, ids=ids)


def bad_calls(rank: int, world_size: int) -> list[str]:
    """Errors of a loss and of `gather_features`; only rank 1 has integer features."""
    x = features(4) if rank != 1 else torch.ones(4, WIDTH, dtype=torch.int64)
    return [
        error_of(distributed.clip_loss, x, x, 2.0), error_of(distributed.gather_features, x, x)
    ]  # fmt: skip


def exchanges_for_agreement(
    rank: int, world_size: int, calls: list[tuple[tuple[int, ...], dict[str, Any]]]
) -> list[tuple[int, str]]:
    """For each call (pairs of each rank, options), the number of exchanges, and its error.

    The group counts as one that moves only GPU tensors, although its tensors are on the CPU.
    """
    exchange, exchanged = agreement.exchange, []

    def on_cpu(group: Any, mine: tuple[int, ...], device: torch.device) -> Any:
        exchanged.append(device.type)
        return exchange(group, mine, torch.device("cpu"))

    def step(n: int, options: dict[str, Any]) -> None:
        distributed.clip_loss(features(n), features(n), 2.0, **options).backward()

    found = []
    gpu = torch.device("cuda")
    with mock.patch.multiple(agreement, exchange=on_cpu, _exchanging_device=lambda *_: gpu):
        for sizes, options in calls:
            before = len(exchanged)
            error = error_of(step, sizes[rank], options)
            found.append((len(exchanged) - before, error))
    return found


def forgotten_rank(rank: int, world_size: int) -> str:
    try:
        ClipLoss(True, True, world_size=world_size)(features(3), features(3), 1.0)
    except ValueError as error:
        return str(error)
    return "no error"


def gathered_with_one_frozen(rank: int, world_size: int) -> float:
    """The largest error in the gradient of the gathered features' sum of squares."""
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
    """Returns 2 for each block: its own, and that of each other rank's texts."""

    def _loss(self, *inputs: Any, negative_only: bool = False) -> torch.Tensor:
        return torch.tensor(2.0)


def own_block(rank: int, world_size: int) -> float:
    loss = OwnBlock(rank=rank, world_size=world_size)
    return float(loss(features(3), features(3), 1.0, None))


def zero_rows_in_fp16(rank: int, world_size: int) -> list[bool]:
    """For each exchange and tower: True if the row of zeros, and no other row, has a gradient of
    zero. The row differs between ranks."""
    found = []
    for ring, tower in ((False, 0), (True, 0), (False, 1), (True, 1)):
        towers = [features(4), features(4)]
        spoilt = towers[tower].detach().half()
        spoilt[rank] = 0
        towers[tower] = spoilt.requires_grad_()
        distributed.clip_loss(*towers, 2.0, normalize=True, ring=ring).backward()
        lengths = spoilt.grad.float().norm(dim=1)
        found.append(
            bool(lengths.isfinite().all()) and (lengths == 0).nonzero().flatten().tolist() == [rank]
        )
    return found


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


def dies(rank: int, world_size: int, seconds: float) -> dict[str, tuple[str, float]]:
    """The errors of the ranks that survive rank 0, and the seconds until each.

    Rank 0 is killed between the forward and the backward of three losses, and in the forward of a
    fourth, before it sends anything around the ring. Each loss has a group whose timeout is
    `seconds`.
    """
    losses, steps = (distributed.clip_loss, distributed.siglip_loss), {}
    for loss, ring in product(losses, (False, True)):
        group = dist.new_group(timeout=timedelta(seconds=seconds))
        x, y = features(5), features(5)
        step = partial(loss, x, y, 2.0, -1.0, process_group=group, ring=ring)
        if loss is distributed.clip_loss or not ring:
            step = step().backward
        steps[f"{loss.__name__} {ring=}"] = step
    dist.barrier()
    if rank == 0:
        with mock.patch.object(
            losses_module, "sharded_loss", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        ):
            step()

    def end(step: Callable[[], Any]) -> tuple[str, float]:
        begun = time.monotonic()
        return error_of(step), time.monotonic() - begun

    with ThreadPoolExecutor() as every:  # all losses wait at the same time
        return dict(zip(steps, every.map(end, steps.values()), strict=True))


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
    world = {"rank": dist.get_rank(group), "world_size": 2, "process_group": group}
    for loss, whole in (
        (partial(distributed.clip_loss, process_group=group), reference.clip_loss),
        (partial(distributed.clip_loss, process_group=group, ring=True), reference.clip_loss),
        (ClipLoss(True, True, **world), reference.clip_loss),
        (ClipLoss(False, True, **world, ring=True), reference.clip_loss),
        (SigLipLoss(**world), reference.siglip_loss),
        (SigLipLoss(**world, dist_impl="gather"), reference.siglip_loss),
    ):
        torch.manual_seed(0)
        x, y = torch.randn(2, 8, WIDTH, dtype=torch.float64).unbind()
        own = slice(0, 4) if rank == 1 else slice(4, 8)
        mine = [t[own].clone().requires_grad_() for t in (x, y)]
        loss(*mine, 3.0, None).backward()
        every = [t.clone().requires_grad_() for t in (x, y)]
        whole(*every, 3.0, None).backward()
        found += [
            float((m.grad / 2 - e.grad[own]).norm() / e.grad[own].norm())
            for m, e in zip(mine, every, strict=True)
        ]
    return found
