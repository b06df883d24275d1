"""`cached_step` in Lightning: torchrun --nproc-per-node 2 docs/examples/with_lightning.py"""

import os

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastclip import cached_step
from fastclip.distributed import clip_loss

BATCH, EPOCHS = 64, 5  # BATCH: pairs of all processes


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, 16)) for width in (24, 12)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return x, y, self.log_scale.exp()


class Training(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # cached_step calls the backward itself
        self.towers = TwoTowers()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = cached_step(
            self.towers, clip_loss, *batch, micro_batch=16, backward=self.manual_backward,
            # Only the last micro-batch exchanges gradients. One process has no DDP.
            no_sync=getattr(self.trainer.strategy.model, "no_sync", None),
        )  # fmt: skip
        optimizer.step()
        self.losses.append(float(self.all_gather(loss).mean()))

    def on_train_epoch_end(self) -> None:
        self.print(f"epoch {self.current_epoch}: loss {self.losses[-1]:.4f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def pairs() -> TensorDataset:
    """Images and texts that show the same thing, each in its own way."""
    torch.manual_seed(1)
    things = torch.randn(8 * BATCH, 6)
    return TensorDataset(*(things @ torch.randn(6, width) for width in (24, 12)))


def train() -> list[float]:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    data = pairs()
    # Lightning's own sampler shuffles as soon as there are two processes.
    sampler = DistributedSampler(data, world, rank, shuffle=False)
    torch.manual_seed(0)
    module = Training()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto",
        max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, BATCH // world, sampler=sampler))
    return module.losses


if __name__ == "__main__":
    train()
