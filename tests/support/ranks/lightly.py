"""One step of the losses of lightly on a share of a batch, for ranks to run."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from support.peers import peer
from torch import Tensor, nn

MODULES = {"ours": "fastclip.integrations.lightly", "theirs": "lightly.loss"}
ROWS, WIDTH = 10, 6  # images of the whole batch, and features


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Weights of pairs; not symmetric."""
    return (x - 2 * y).square().sum(1)


def step(
    rank: int, world: int, whose: str, name: str, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The loss of this rank's part of the batch, and the mean over ranks of the model's gradient,
    as DDP takes it."""
    peer("lightly")
    torch.manual_seed(0)
    views = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    model = nn.Linear(WIDTH, 5, dtype=torch.float64)
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    of = importlib.import_module(MODULES[whose])
    loss = getattr(of, name)(0.2, gather_distributed=world > 1, **options)
    value = loss(*(model(view[share]) for view in views))
    value.backward()
    gradient = model.weight.grad / world
    if world > 1:
        dist.all_reduce(gradient)
    return value.detach(), gradient
