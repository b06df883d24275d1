"""The demo's task, also with a smaller model, and functions that ranks run on it."""

import signal
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from fastclip.clip.model import CLIP
from fastclip.demo.checkpoint import Checkpoint
from fastclip.demo.loop import Run, train
from fastclip.demo.losses import BatchLoss
from fastclip.demo.train import Task
from fastclip.demo.workers import ALONE, Workers


@cache
def small() -> Task:
    """The demo's data with a smaller model."""
    task = whole()
    sizes = {"embed_dim": 32, "image_width": 32, "image_heads": 2, "text_width": 32}
    return replace(task, config=replace(task.config, **sizes, text_heads=2))


@cache
def whole() -> Task:
    """The demo's data and model."""
    return Task.load()


def trained(task: Task, batch_size: int, **options: Any) -> Run:
    """Returns the record of a training. Options: as `trained_parts`."""
    return trained_parts(task, batch_size, **options)[0]


def trained_parts(
    task: Task, batch_size: int, *, workers: Workers = ALONE, loss: str = "clip",
    implementation: str = "fused", matching: str = "none", seed: int = 0, lr: float = 1e-3,
    **options: Any,
) -> tuple[Run, CLIP, BatchLoss]:  # fmt: skip
    """Returns the record of a training, the model and the loss. Options: also those of `train`."""
    task = replace(task, workers=workers, loss=loss, matching=matching)
    model, stream = task.start(seed, batch_size)
    run = Run()
    batch_loss = task.batch_loss(implementation, batch_size, seed)
    train(model, stream, batch_loss, run, lr=lr, workers=workers, **options)
    return run, model, batch_loss


def parameters_after(
    rank: int, size: int, batch_size: int, options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Returns the small model's and its loss's parameters after a training."""
    _, *parts = trained_parts(small(), batch_size, workers=Workers(rank, size), **options)
    return {
        f"{name}.{key}": value.detach()
        for name, part in zip(("model", "loss"), parts, strict=True)
        for key, value in part.named_parameters()
    }


def curve(rank: int, size: int, batch_size: int, options: dict[str, Any]) -> list[float]:
    """Returns the loss curve of the small model."""
    return trained(small(), batch_size, workers=Workers(rank, size), **options).losses


def curve_and_state(
    rank: int, size: int, batch_size: int, checkpoint: Checkpoint, broken: int, options: dict,
    stop: int | None = None,
) -> list[float]:  # fmt: skip
    """Returns the loss curve of the demo's model, and writes its state after `broken` steps."""
    task, workers = whole(), Workers(rank, size)
    trained(task, batch_size, workers=workers, checkpoint=checkpoint, **options, stop=broken)
    return trained(task, batch_size, workers=workers, **options, stop=stop).losses


def averaged_gradient(rank: int, size: int) -> float:
    """Returns a parameter's gradient, rank + 1 before."""
    parameter = torch.nn.Parameter(torch.tensor(0.0))
    parameter.grad = torch.tensor(rank + 1.0)
    Workers(rank, size).average([parameter])
    return parameter.grad.item()


def stop_requested_on_the_last_rank(rank: int, size: int) -> tuple[int, tuple[float, bool]]:
    """Returns the step after which this rank stops (0: none), and `over_all_ranks`'s result."""
    workers, run = Workers(rank, size), Run()
    last = rank == size - 1
    task = replace(small(), workers=workers)
    model, stream = task.start(0, 8)
    loss = task.batch_loss("fused", 8)
    try:
        # There is one step: a rank that misses the request finishes instead of waiting forever.
        train(
            model, stream, loss, run, steps=1, lr=1e-3, workers=workers, stop_requested=lambda: last
        )
    except KeyboardInterrupt:
        stopped = len(run.losses)
    else:
        stopped = 0
    return stopped, workers.over_all_ranks(torch.tensor(float(rank)), last)


def bucket_layouts(rank: int, size: int, steps: int) -> list[list[tuple[int, ...]]]:
    """Returns for each step the parameters of each bucket, in the order of their reduction."""
    workers = Workers(rank, size)
    task = replace(small(), workers=workers)
    model, stream = task.start(0, 8)
    loss = task.batch_loss("fused", 8)
    wrapped = workers.wrap(model)
    places = {id(p): place for place, p in enumerate(model.parameters())}
    seen: list[list[tuple[int, ...]]] = []

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        seen[-1].append(tuple(places[id(p)] for p in bucket.parameters()))
        return default_hooks.allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, hook)
    for _ in range(steps):
        seen.append([])
        batch = next(stream)
        loss(batch, **wrapped(batch.images, batch.tokens)).backward()
    return seen


def received_from_first(rank: int, size: int, results: list[Any]) -> list[Any]:
    """Returns the results and errors that a rank receives from rank 0."""
    received = []
    for result in results:

        def make(result: Any = result) -> Any:
            assert rank == 0
            if isinstance(result, Exception):
                raise result
            return result

        try:
            received.append(Workers(rank, size).from_first(make))
        except (ValueError, OSError) as error:
            received.append(f"{type(error).__name__}: {error}")
    return received


def heed_interrupts() -> None:
    """Makes a process that is about to start react to Ctrl-C. A shell that runs the tests in the
    background makes them and their child processes ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def groups_of_a_lone_worker() -> bool:
    """True if a worker without others sets up a process group."""
    with ALONE.group(torch.device("cpu")):
        return dist.is_initialized()
