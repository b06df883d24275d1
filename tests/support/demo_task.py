"""The demo's own task with a smaller model, and what ranks of `ranks.py` train on it."""

import signal
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from fastclip.demo.checkpoint import Checkpoint
from fastclip.demo.loop import Run, loss_of, train
from fastclip.demo.train import Task
from fastclip.demo.workers import ALONE, Workers


@cache
def small() -> Task:
    task = whole()
    sizes = {"embed_dim": 32, "image_width": 32, "image_heads": 2, "text_width": 32}
    return replace(task, config=replace(task.config, **sizes, text_heads=2))


@cache
def whole() -> Task:
    return Task.load()


def trained(
    task: Task, batch_size: int, *, workers: Workers = ALONE, loss: str = "fused", seed: int = 0,
    lr: float = 1e-3, **options: Any,
) -> Run:  # fmt: skip
    model, stream = replace(task, workers=workers).start(seed, batch_size)
    run = Run()
    of_all = loss_of(loss, workers, batch_size)
    train(model, stream, of_all, run, lr=lr, workers=workers, **options)
    return run


def curve(rank: int, size: int, batch_size: int, options: dict[str, Any]) -> list[float]:
    """Of the small model."""
    return trained(small(), batch_size, workers=Workers(rank, size), **options).losses


def curve_and_state(
    rank: int, size: int, batch_size: int, checkpoint: Checkpoint, broken: int, options: dict,
    stop: int | None = None,
) -> list[float]:  # fmt: skip
    """Of the demo's own model; and its state after `broken` steps, in a file."""
    task, workers = whole(), Workers(rank, size)
    trained(task, batch_size, workers=workers, checkpoint=checkpoint, **options, stop=broken)
    return trained(task, batch_size, workers=workers, **options, stop=stop).losses


def step_of_which_one_asks_to_stop(rank: int, size: int) -> tuple[int, tuple[float, bool]]:
    """The step after which it stops, 0 where it is never told to; what the ranks' account says."""
    workers, run = Workers(rank, size), Run()
    last = rank == size - 1
    model, stream = replace(small(), workers=workers).start(0, 8)
    loss = loss_of("fused", workers, 8)
    try:
        # Its steps are over then: a rank that does not hear of it ends, and waits for nobody.
        train(
            model, stream, loss, run, steps=1, lr=1e-3, workers=workers, stop_requested=lambda: last
        )
    except KeyboardInterrupt:
        stopped = len(run.losses)
    else:
        stopped = 0
    return stopped, workers.account(torch.tensor(float(rank)), last)


def bucket_layouts(rank: int, size: int, steps: int) -> list[list[tuple[int, ...]]]:
    """For each step, which parameters' gradients travel in which order."""
    workers = Workers(rank, size)
    model, stream = replace(small(), workers=workers).start(0, 8)
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
        loss_of("fused", workers, 8)(**wrapped(batch.images, batch.tokens)).backward()
    return seen


def told_by_the_first(rank: int, size: int, answers: list[Any]) -> list[Any]:
    """What every rank hears of rank 0's answers, errors among them."""
    heard = []
    for answer in answers:

        def make(answer: Any = answer) -> Any:
            assert rank == 0
            if isinstance(answer, Exception):
                raise answer
            return answer

        try:
            heard.append(Workers(rank, size).from_first(make))
        except (ValueError, OSError) as error:
            heard.append(f"{type(error).__name__}: {error}")
    return heard


def heed_interrupts() -> None:
    """In a process about to be started: a shell that runs the tests in the background has them, and
    what they start, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def groups_of_a_lone_worker() -> bool:
    with ALONE.group(torch.device("cpu")):
        return dist.is_initialized()
