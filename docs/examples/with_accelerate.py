"""`cached_step` in a training loop of Accelerate: the batch is larger than the towers can hold.

torchrun --nproc-per-node 2 docs/examples/with_accelerate.py
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

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


def pairs() -> TensorDataset:
    """Images and texts that show the same thing, each in its own way."""
    torch.manual_seed(1)
    things = torch.randn(8 * BATCH, 6)
    return TensorDataset(*(things @ torch.randn(6, width) for width in (24, 12)))


def train() -> list[float]:
    # Each process takes its part of a batch of BATCH pairs.
    loading = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(cpu=True, dataloader_config=loading)
    loader = DataLoader(pairs(), batch_size=BATCH)
    torch.manual_seed(0)
    model = TwoTowers()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for epoch in range(EPOCHS):
        for images, texts in loader:
            with accelerator.accumulate(model):
                loss = cached_step(
                    model, clip_loss, images, texts, micro_batch=16,
                    backward=accelerator.backward,
                )  # fmt: skip
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(accelerator.reduce(loss, "mean")))
        accelerator.print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    train()
