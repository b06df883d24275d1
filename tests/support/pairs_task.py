"""Trainings of a tiny model on exported emoji, and functions that ranks run."""

from typing import Any

from torch import Tensor

from fastclip.demo.checkpoint import Checkpoint
from fastclip.demo.command_line import parser
from fastclip.demo.loop import train
from fastclip.demo.losses import IMPLEMENTATIONS, LOSSES
from fastclip.demo.workers import ALONE, Workers
from fastclip.pairs.command_line import add_options
from fastclip.pairs.evaluate import features
from fastclip.pairs.pair import LeftOut
from fastclip.pairs.report import EvaluatedRun
from fastclip.pairs.source import read_pairs
from fastclip.pairs.task import Task

TINY = [
    "--image-size", "16", "--image-width", "16", "--image-heads", "2", "--image-layers", "1",
    "--text-width", "16", "--text-heads", "2", "--embed-dim", "16", "--vocab-size", "300",
    "--batch-size", "9", "--workers", "0", "--steps", "5", "--evaluate-every", "2",
]  # fmt: skip


def loaded(source: str, *options: str, workers: Workers = ALONE) -> Task:
    command = parser(LOSSES, IMPLEMENTATIONS)
    add_options(command)
    args = command.parse_args(["--pairs", source, *TINY, *options])
    left_out = LeftOut()
    pairs = read_pairs(source, left_out, args.image_column, args.caption_column)
    return Task.load(args, pairs, left_out, "cpu", workers)


def trained(
    task: Task, checkpoint: Checkpoint | None = None, stop: int | None = None, **state: Any
) -> list[float]:
    """Returns the loss curve."""
    model, stream, loss = task.start()
    run, args = EvaluatedRun(), task.args
    train(
        model, stream, loss, run, steps=args.steps, lr=args.lr, weight_decay=args.weight_decay,
        micro_batch=args.micro_batch, stop=stop, workers=task.workers, checkpoint=checkpoint,
        **state,
    )  # fmt: skip
    return run.losses


def curve(source: str, *options: str, workers: Workers = ALONE) -> list[float]:
    return trained(loaded(source, *options, workers=workers))


def found_by_a_rank(
    rank: int, size: int, source: str, options: list[str]
) -> tuple[list[float], dict[str, int], int, tuple[Tensor, Tensor]]:
    """Returns a rank's loss curve, the rows it left out, the number of images it decoded for one
    batch, and the features of held-out pairs of an untrained model."""
    workers = Workers(rank, size)
    task = loaded(source, *options, workers=workers)
    model, stream, _ = task.start()
    held_out = task.held_out_set()
    found = features(model, held_out, held_out.pixels(workers, 0), task.encode, workers)
    return trained(task), task.left_out.counts, len(next(stream).images), found
