"""CLIP's loss of a batch that is spread over processes, in plain PyTorch.

torchrun --nproc-per-node 2 docs/examples/with_torchrun.py

`python docs/examples/with_torchrun.py` trains in one process, with the same losses.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastclip.distributed import clip_loss

BATCH, STEPS = 64, 40  # BATCH: pairs of all processes


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


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Returns images and texts that show the same thing, each in its own way."""
    noise = torch.Generator().manual_seed(step % 8)
    views = torch.Generator().manual_seed(99)
    things = torch.randn(BATCH, 6, generator=noise)
    return tuple(things @ torch.randn(6, width, generator=views) for width in (24, 12))


def train() -> list[float]:
    grouped = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    torch.manual_seed(0)
    model = DistributedDataParallel(TwoTowers()) if grouped else TwoTowers()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        own = [t.tensor_split(world)[rank] for t in batch(step)]
        # The loss of all processes' pairs. DDP's mean of the gradients is then the exact one.
        loss = clip_loss(*model(*own))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if grouped:  # the mean over processes is the loss of the whole batch
            dist.all_reduce(loss)
        losses.append(float(loss) / world)
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    if "RANK" in os.environ:
        # If a process dies, the others raise an error after this time.
        dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    train()
    if dist.is_initialized():
        dist.destroy_process_group()
