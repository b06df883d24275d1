"""Modules of losses on ranks, for `test_modules_on_ranks.py`."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import torch
import torch.distributed as dist
from support.ranks.failures import error_of
from torch import Tensor, nn

from fastclip import distributed
from fastclip.engine import warn_once
from fastclip.loss import (
    ClipLoss,
    CoCaLoss,
    DistillClipLoss,
    GlobalClipLoss,
    InfoNCELoss,
    SigLipLoss,
    SupConLoss,
)

WIDTH = 6


def pairs(rank: int, n: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n, WIDTH, generator=generator).requires_grad_() for _ in range(2)]


LOCAL: dict[str, Any] = {
    "ClipLoss": lambda x, y: ClipLoss()(x, y, 2.0),
    "SigLipLoss": lambda x, y: SigLipLoss()(x, y, 2.0, -1.0),
    "CoCaLoss": lambda x, y: CoCaLoss(1.0, 1.0)(x, y, x[:, None], torch.ones(4, 1).long(), 2.0)[0],
    "DistillClipLoss": lambda x, y: DistillClipLoss()(x, y, 2.0, y, x, 2.0)[0],
}  # fmt: skip


def local(rank: int, world_size: int, name: str, compiles: bool) -> tuple[list[str], float]:
    """The warnings of two calls of a loss with world_size=1, in a process that has had none, each
    with its file; and the difference of the value from that in a group of this rank alone."""
    alone = [dist.new_group([k]) for k in range(world_size)][rank]
    loss, x, y = LOCAL[name], *pairs(rank)
    if compiles:
        torch._dynamo.reset()
        loss = torch.compile(loss, backend="eager", fullgraph=True)
    warn_once._given.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        of_one = (SigLipLoss if name == "SigLipLoss" else ClipLoss)(process_group=alone)
        right = of_one(x, y, 2.0, -1.0)
        value = [loss(x, y), loss(x, y)][1]
    found = [f"{w.message} {w.filename}" for w in caught if "world_size" in str(w.message)]
    return found, float((value - right).abs())


def with_group(group: dist.ProcessGroup, rank: int, world_size: int) -> dict[str, nn.Module]:
    world = {"rank": rank, "world_size": world_size, "process_group": group}
    across = {"across_ranks": True, "process_group": group}
    return {
        "ClipLoss": ClipLoss(True, True, **world), "SigLipLoss": SigLipLoss(**world),
        "CoCaLoss": CoCaLoss(1.0, 1.0, local_loss=True, gather_with_grad=True, **world),
        "DistillClipLoss": DistillClipLoss(True, True, **world),
        "InfoNCELoss": InfoNCELoss(**across), "SupConLoss": SupConLoss(**across),
        "GlobalClipLoss": GlobalClipLoss(8, **across),
    }  # fmt: skip


def copied(rank: int, world_size: int) -> dict[str, list[str]]:
    """For each module with a group, the errors of pickle and torch.save. Copies must have the same
    group, and buffers of their own if they are deep."""
    group = dist.new_group(list(range(world_size)))
    x, y = pairs(rank)
    found = {}
    for name, module in with_group(group, rank, world_size).items():
        both = copy.deepcopy(nn.ModuleList([module, module]))
        assert both[0] is both[1] and both[0] is not module
        for one in (both[0], copy.copy(module)):
            assert type(one) is type(module) and one.process_group is group
        for mine, theirs in zip(module.buffers(), both[0].buffers(), strict=True):
            assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
        if name == "ClipLoss":
            assert torch.equal(both[0](x, y, 2.0), module(x, y, 2.0))
        found[name] = [
            error_of(pickle.dumps, module), error_of(torch.save, module, io.BytesIO())
        ]  # fmt: skip
        module.process_group = None
        module.rank, module.world_size = rank, world_size
        loaded = pickle.loads(pickle.dumps(module))
        loaded.process_group = group
        if name == "ClipLoss":
            assert torch.equal(loaded(x, y, 2.0), both[0](x, y, 2.0))
    return found


def script(rank: int, world_size: int) -> list[Any]:
    """A step that is written once for one process, with a group or without, and for many: the
    value and the gradient of this rank's images."""
    x, y = pairs(rank)
    value = distributed.clip_loss(x, y, 2.0)
    value.backward()
    return [value.item(), x.grad]
