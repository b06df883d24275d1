"""One step of sentence-transformers' losses on a share of a batch, for ranks to run."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from support.embedded import Projected, guide
from support.peers import peer
from torch import Tensor

MODULES = {
    "ours": "fastclip.integrations.sentence_transformers",
    "theirs": "sentence_transformers.sentence_transformer.losses",
}
ROWS, WIDTH = 10, 6  # pairs of the whole batch, and features


def step(
    rank: int, world: int, whose: str, name: str, columns: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The loss of this rank's part of the batch, and the mean over ranks of the model's gradient,
    as DDP takes it."""
    peer("sentence_transformers")
    generator = torch.Generator().manual_seed(1)
    batch = [
        {"embedding": torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64),
         "guide": torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)}
        for _ in range(columns)
    ]  # fmt: skip
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    model = Projected(WIDTH, 5)
    guides = (guide(),) if "GIST" in name else ()
    loss = getattr(importlib.import_module(MODULES[whose]), name)(
        model, *guides, gather_across_devices=world > 1, **options
    )
    value = loss([{key: x[share] for key, x in column.items()} for column in batch], None)
    value.backward()
    gradient = model.linear.weight.grad / world
    if world > 1:
        dist.all_reduce(gradient)
    return value.detach(), gradient
