"""Cached steps in the training loops of Accelerate and Lightning, for `test_trainers.py`."""

import os
from typing import Any

import torch
import torch.distributed as dist
from support.peers import peer
from support.ranks.cached import counted
from support.ranks.training import Towers, data, gradients_of_one_process, own, worst
from torch import Tensor

from fastclip import cached_step, distributed

ACCUMULATION = 2


def environment(rank: int, world_size: int) -> None:
    """Sets the variables of torchrun; the group of the ranks is there already."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip


def batches(rank: int, world_size: int) -> list[list[Tensor]]:
    """Two batches of this rank."""
    pairs = own(rank, data(world_size))
    return [pairs, [t.flip(1) for t in pairs]]


def accelerated(rank: int, world_size: int, cached: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of two accumulated batches, and the number of all-reduces."""
    Accelerator = peer("accelerate").Accelerator
    environment(rank, world_size)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    model = accelerator.prepare(Towers().double())
    exchanges = counted(model) if world_size > 1 else []
    for pairs in batches(rank, world_size):
        with accelerator.accumulate(model):
            if cached:
                cached_step(model, distributed.clip_loss, *pairs, micro_batch=4,
                            backward=accelerator.backward)  # fmt: skip
            else:
                accelerator.backward(distributed.clip_loss(*model(*pairs)))
    inside = accelerator.unwrap_model(model)
    return {name: p.grad for name, p in inside.named_parameters()}, len(exchanges)


def with_lightning(rank: int, world_size: int, no_sync: bool) -> tuple[float, int]:
    """A step of manual optimisation: the largest error of a gradient, and the number of
    all-reduces."""
    lightning = peer("pytorch_lightning")
    environment(rank, world_size)
    found: dict[str, Tensor] = {}

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.towers = Towers().double()

        def training_step(self, pairs: Any, index: int) -> None:
            wrapped = self.trainer.strategy.model
            optimizer = self.optimizers()
            optimizer.zero_grad()
            cached_step(
                self.towers, distributed.clip_loss, *pairs, micro_batch=2,
                backward=self.manual_backward, no_sync=wrapped.no_sync if no_sync else None,
            )  # fmt: skip
            found.update((n, p.grad.clone()) for n, p in self.towers.named_parameters())
            optimizer.step()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_start(self) -> None:
            self.exchanges = counted(self.trainer.strategy.model)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=world_size, strategy="ddp", max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    rows = torch.utils.data.TensorDataset(*own(rank, data(world_size)))
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=len(rows)))
    assert dist.is_initialized()
    return worst(found, gradients_of_one_process(world_size)), len(module.exchanges)
