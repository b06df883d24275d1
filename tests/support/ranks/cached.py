"""Cached steps across ranks, for `test_cached_ranks.py`."""

import contextlib
import functools
import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from support.ranks.training import Towers, data, gradients_of_one_process, own, worst
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from fastclip import cached_step, distributed, reference
from fastclip.engine import warn_once
from fastclip.loss import ClipLoss

STEPS, RATE = 12, 0.2


def descend(model: nn.Module, step: Callable[[], Tensor]) -> list[float]:
    values = []
    for _ in range(STEPS):
        model.zero_grad()
        values.append(float(step()))
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad
    return values


def curve_of_one_process(world_size: int) -> list[float]:
    model = Towers().double()

    def step() -> Tensor:
        value = reference.clip_loss(*model(*data(world_size)))
        value.backward()
        return value.detach()

    return descend(model, step)


def average(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def curve(
    rank: int, world_size: int, how: str
) -> tuple[list[float], list[float], list[str], float]:
    """The losses of a training, those of one process, warnings, and how far the ranks' parameters
    are from the first rank's. how: "wrapped" passes DDP, "inside" the module in it."""
    warn_once._given.clear()
    wrapped = DistributedDataParallel(Towers().double())
    model = wrapped if how == "wrapped" else wrapped.module

    def step() -> Tensor:
        pairs = own(rank, data(world_size))
        return cached_step(model, distributed.clip_loss, *pairs, micro_batch=4)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = descend(wrapped, step)
    flat = torch.cat([p.detach().flatten() for p in wrapped.parameters()])
    first = flat.clone()
    dist.broadcast(first, 0)
    texts = [str(w.message) for w in caught if "cached_step" in str(w.message)]
    whole = curve_of_one_process(world_size)
    apart = average(float((flat - first).norm()))
    return [average(value) for value in losses], whole, texts, apart


def counted(model: DistributedDataParallel) -> list[int]:
    """A list that grows with each all-reduce of this model's gradients."""
    exchanges: list[int] = []

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        exchanges.append(bucket.index())
        return default_hooks.allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    return exchanges


class Trainer:
    """Holds a model as an attribute, as trainers do."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def encode(self, *rows: Tensor) -> Any:
        return self.model(*rows)


def in_a_function(rank: int, world_size: int, how: str) -> tuple[float, int]:
    """DDP is found behind a function: the largest error of a gradient, and the all-reduces."""
    model = DistributedDataParallel(Towers().double())
    exchanges = counted(model)
    pairs = own(rank, data(world_size))
    trainer = Trainer(model)
    functions = {
        "closure": lambda *rows: model(*rows),
        "default": lambda images, texts, own=model: own(images, texts),
        "keyword default": lambda *rows, own=model: own(*rows),
        "method": trainer.encode,
        "closure of an object": lambda *rows: trainer.model(*rows),
        "hidden": lambda *rows: hidden[0](*rows),
    }
    hidden, backward = [model], Tensor.backward if how == "hidden" else None
    cached_step(functions[how], distributed.clip_loss, *pairs, micro_batch=2, backward=backward)
    found = {name: p.grad for name, p in model.module.named_parameters()}
    return worst(found, gradients_of_one_process(world_size)), len(exchanges)


class Text(nn.Module):
    """A text tower with the scale, which the loss uses."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.tower, self.logit_scale = towers.text, towers.logit_scale

    def forward(self, texts: Tensor) -> Tensor:
        return nn.functional.normalize(self.tower(texts), dim=-1)


def two_towers(rank: int, world_size: int) -> tuple[float, list[int]]:
    """Each tower in a DDP of its own, in micro-batches of 2 and of 4."""
    towers = Towers().double()
    text = DistributedDataParallel(Text(towers))
    image = DistributedDataParallel(nn.Sequential(towers.image, Normalise()))
    counts = [counted(image), counted(text)]
    images, texts = own(rank, data(world_size))
    cached_step(
        (image, text), distributed.clip_loss, images, texts, micro_batch=(2, 4),
        shared=towers.logit_scale.exp(),
    )  # fmt: skip
    found = {name: p.grad for name, p in towers.named_parameters()}
    return worst(found, gradients_of_one_process(world_size)), [len(c) for c in counts]


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


def one_rank_is_empty(rank: int, world_size: int) -> float:
    """The last rank has no pairs."""
    model = DistributedDataParallel(Towers().double())
    pairs = own(rank, data(world_size - 1)) if rank < world_size - 1 else [t[:0] for t in data(1)]
    loss = functools.partial(distributed.clip_loss, uneven=True)
    cached_step(model, loss, *pairs, micro_batch=4)
    found = {name: p.grad for name, p in model.module.named_parameters()}
    return worst(found, gradients_of_one_process(world_size - 1))


def without_gradients(rank: int, world_size: int) -> tuple[float, float, int]:
    model = DistributedDataParallel(Towers().double())
    with torch.no_grad():
        pairs = own(rank, data(world_size))
        value = cached_step(model, distributed.clip_loss, *pairs, micro_batch=4)
    exact = reference.clip_loss(*Towers().double()(*data(world_size)))
    return average(float(value)), float(exact), sum(p.grad is not None for p in model.parameters())


def raise_(error: Exception) -> Any:
    raise error


class FailingLoss(ClipLoss):
    def forward(self, *outputs: Any) -> Tensor:
        raise OSError("no file")


def failing(loss: Any) -> Any:
    """A loss of the same kind that fails in code of its own, before ranks agree in it."""
    if isinstance(loss, ClipLoss):
        return FailingLoss(rank=loss.rank, world_size=loss.world_size)
    return functools.wraps(loss)(lambda *outputs: raise_(OSError("no file")))


def failing_at(call: int, model: Any) -> Any:
    """A model that fails at this call."""
    calls = itertools.count(1)
    return lambda *rows: raise_(OSError("no memory")) if next(calls) == call else model(*rows)


def misfit(rank: int, world_size: int, fault: str, how: str) -> tuple[str, float]:
    """The error of this rank, and the seconds it took, if the last rank has a fault.
    how: what tells the ranks of each other: DDP, the loss, or a trainer's backward."""
    towers = Towers().double()
    model: Any = DistributedDataParallel(towers) if how == "ddp" else towers
    loss: Any = distributed.clip_loss
    if how == "module":
        loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    if how == "backward":
        loss = lambda *outputs: distributed.clip_loss(*outputs)  # noqa: E731
    images, texts = own(rank, data(world_size))
    options: dict[str, Any] = {"micro_batch": 4}
    if how == "backward":
        options |= {"backward": Tensor.backward, "no_sync": contextlib.nullcontext}
    if rank == world_size - 1:
        if fault == "rows":
            texts = texts[1:]
        elif fault == "micro_batch":
            options["micro_batch"] = 0
        elif fault == "outputs":
            plain, model = model, lambda *rows: (plain(*rows)[0][:1], *plain(*rows)[1:])
        elif fault == "model":
            model = functools.partial(lambda inner, *rows: raise_(OSError("no file")), model)
        elif fault == "again":  # in the first micro-batch of the second encoding
            model = failing_at(3, model)
        elif fault == "loss":
            loss = failing(loss)
        elif fault == "after the loss":  # whose backward is an exchange
            loss = lambda *outputs: [distributed.clip_loss(*outputs), raise_(OSError("no file"))]  # noqa: E731
        elif fault == "check":
            options["check"] = False
        elif fault == "encodings":
            drift = iter(range(100))
            plain, model = model, lambda x, y: plain(x * (1 + next(drift)), y)
    started = time.monotonic()
    try:
        cached_step(model, loss, images, texts, **options)
        return "no error", time.monotonic() - started
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started


def refused_in_a_smaller_group(rank: int, world_size: int) -> tuple[str, float]:
    """The error of this rank, and the seconds it took, if ranks 0 and 1 share a loss that refuses
    rank 1's scale, and all ranks share DDP."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    model = DistributedDataParallel(Towers().double())
    of_rank: Any = (lambda *rows: (*model(*rows)[:2], "five")) if rank == 1 else model
    loss = functools.partial(distributed.clip_loss, process_group=groups[rank // 2])
    started = time.monotonic()
    try:
        cached_step(of_rank, loss, *own(rank, data(world_size)), micro_batch=4)
        return "no error", time.monotonic() - started
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started


def different_numbers(rank: int, world_size: int, kind: str) -> str:
    """The error of ranks with different numbers of micro-batches, or "none"."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = Towers().double()
    if kind == "fsdp":
        model = Towers(shape=(1,)).double()
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    else:
        if kind == "buffers":
            model.register_buffer("seen", torch.zeros(()))
        model = DistributedDataParallel(model)
        if kind == "statistics":
            model.module.norm = nn.SyncBatchNorm(8)  # DDP takes it on GPUs only
            model.broadcast_buffers = False
    pairs = own(rank, data(world_size))
    try:
        cached_step(model, distributed.clip_loss, *pairs, micro_batch=2 + rank)
    except ValueError as error:
        return str(error)
    return "none"
