"""Training steps for `test_distributed_training.py`: their errors, bytes sent and bytes held."""

import itertools
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.bench import importing  # noqa: F401 -- makes `bench` importable
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from bench.measure.traffic import Traffic
from fastclip import cached_step, distributed, reference
from fastclip.loss import ClipLoss

WIDTH, B_EACH = 10, 6


class Towers(nn.Module):
    """Two towers and a scale; returns the same tuple as open_clip's models."""

    def __init__(self, checkpointed: bool = False, frozen: bool = False, shape: tuple = ()) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = (
            nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2)
        )
        self.text.requires_grad_(not frozen)
        self.logit_scale = nn.Parameter(torch.full(shape, 2.0))
        self.checkpointed = checkpointed

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = []
        for tower, x in ((self.image, images), (self.text, texts)):
            y = checkpoint(tower, x, use_reentrant=False) if self.checkpointed else tower(x)
            features.append(F.normalize(y, dim=-1))
        return *features, self.logit_scale.exp()


def data(world_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (world_size * B_EACH, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def gradients_of_one_process(world_size: int, **options: Any) -> dict[str, Tensor]:
    model = Towers(**options).double()
    reference.clip_loss(*model(*data(world_size))).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient."""
    assert found.keys() == exact.keys()
    return max(float((found[k] - exact[k]).norm() / exact[k].norm()) for k in exact)


def own(rank: int, tensors: list[Tensor]) -> list[Tensor]:
    return [t[rank * B_EACH : (rank + 1) * B_EACH] for t in tensors]


def under_ddp(rank: int, world_size: int, options: dict[str, Any], ddp: dict[str, Any]) -> float:
    model = DistributedDataParallel(Towers(**options).double(), **ddp)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    for _ in range(2):  # DDP records a static graph in the first step
        model.zero_grad()
        loss(*model(*own(rank, data(world_size)))).backward()
    found = {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}
    return worst(found, gradients_of_one_process(world_size, **options))


def cached_under_ddp(rank: int, world_size: int) -> tuple[float, int]:
    """With micro-batches of 4 and 2: the largest error of a gradient, the number of all-reduces."""
    model = DistributedDataParallel(Towers().double())
    exchanges = []

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        exchanges.append(bucket.index())
        return default_hooks.allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    cached_step(model, loss, *own(rank, data(world_size)), micro_batch=4)
    found = {name: p.grad for name, p in model.module.named_parameters()}
    return worst(found, gradients_of_one_process(world_size)), len(exchanges)


def cached_in_a_static_graph(rank: int, world_size: int) -> str:
    model = DistributedDataParallel(Towers().double(), static_graph=True)
    try:
        cached_step(model, distributed.clip_loss, *own(rank, data(world_size)), micro_batch=4)
    except ValueError as error:
        return str(error)
    return "no error"


def under_fsdp(rank: int, world_size: int, micro_batch: int | None) -> tuple[float, int]:
    """The largest error of a gradient, and the bytes of gradients that this rank sends."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Towers(shape=(1,)).double()
    mesh = init_device_mesh("cpu", (world_size,))
    for tower in (model.image, model.text):
        fully_shard(tower, mesh=mesh)
    fully_shard(model, mesh=mesh)
    pairs = own(rank, data(world_size))
    with Traffic() as traffic:
        if micro_batch is None:
            distributed.clip_loss(*model(*pairs)).backward()
        else:
            cached_step(model, distributed.clip_loss, *pairs, micro_batch=micro_batch)
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    error = worst(found, gradients_of_one_process(world_size, shape=(1,)))
    return error, traffic.sent["reduce_scatter"]


def most_held(
    rank: int, world_size: int, loss: str, b: int, d: int, dtype: torch.dtype, ring: bool
) -> int:
    """The peak of the bytes that a rank holds beside its features, gradients included."""
    x, y = (torch.randn(b, d).to(dtype).requires_grad_() for _ in range(2))

    def step() -> None:
        options = {"normalize": True, "ring": ring, "memory_budget": 0}
        getattr(distributed, f"{loss}_loss")(x, y, 5.0, -1.0, **options).backward()

    step()
    x.grad = y.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    events = run.profiler.kineto_results.events()
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


def bytes_sent(
    rank: int, world_size: int, loss: str, sizes: tuple[int, ...], d: int, dtype: torch.dtype,
    ring: bool,
) -> Counter:  # fmt: skip
    """The bytes that this rank sends in a forward and a backward, by kind of exchange. sizes: each
    rank's number of pairs."""
    x, y = (torch.randn(sizes[rank], d).to(dtype).requires_grad_() for _ in range(2))
    options = {"normalize": True, "ring": ring, "uneven": len(set(sizes)) > 1}
    with Traffic() as traffic:
        getattr(distributed, f"{loss}_loss")(x, y, 5.0, -1.0, **options).backward()
    return traffic.sent
