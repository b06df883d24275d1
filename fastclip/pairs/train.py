"""Trains the thin CLIP on one's own pairs and evaluates it on a held-out share of them.

    python -m fastclip.train --pairs pairs.csv
    torchrun --nproc-per-node 2 -m fastclip.train --pairs pairs.csv    # the same curve

The loop, the losses, checkpoints and the division among processes are those of `fastclip.demo`.
"""

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ..clip.model import CLIP
from ..command_line import OneLineParser, checked_device
from ..demo.checkpoint import Checkpoint
from ..demo.command_line import writable_folder
from ..demo.losses import BatchLoss
from ..demo.saving import (
    continuation,
    exits_when_interrupted,
    state_to_continue,
    train_and_save,
)
from ..demo.workers import Workers
from .batches import Batches
from .evaluate import HeldOut, features
from .images import quiet_pillow
from .pair import LeftOut
from .report import EvaluatedRun, introduction, write_results
from .source import read_pairs
from .task import Task, config_of

SAMPLE = 1000  # held-out images that are evaluated during the training


def train_and_evaluate(
    task: Task, start: tuple[CLIP, Batches, BatchLoss], run: EvaluatedRun, weights: Path,
    checkpoint: Checkpoint, state: dict[str, Any] | None,
) -> tuple[HeldOut | None, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """Trains on all ranks; returns the held-out pairs with their features, None if there are
    none.

    start: from `task.start`.
    """
    args, workers = task.args, task.workers
    say = print if workers.first else lambda *_, **__: None
    model, stream, loss = start
    for line in introduction(task, model):
        say(line)
    if state is not None:
        say(continuation(checkpoint, state, args.steps))
    sample = task.held_out_set(SAMPLE) if task.held_out and args.evaluate_every else None
    pixels = list(sample.pixels(workers, args.workers)) if sample else []

    def evaluate(done: int) -> None:
        if sample is None or done % args.evaluate_every:
            return
        found = features(model, sample, pixels, task.encode, workers)
        if workers.first:
            run.evaluations[done] = sample.scores(found)

    try:
        train_and_save(
            model, stream, loss, run, weights, {"tokenizer": "tokenizer.json"},
            workers=workers, checkpoint=checkpoint, state=state, after_step=evaluate,
            label=f"{args.implementation} loss", steps=args.steps, lr=args.lr,
            weight_decay=args.weight_decay, micro_batch=args.micro_batch,
        )  # fmt: skip
    finally:
        if run.saved:
            (args.out / "tokenizer.json").write_text(task.tokenizer_text, encoding="utf-8")
    if not task.held_out:
        return None, None
    whole = task.held_out_set()
    found = features(model, whole, whole.pixels(workers, args.workers), task.encode, workers)
    return whole, found


def main(args: argparse.Namespace, options: OneLineParser) -> None:
    """Runs a training with the options that `options` parsed."""
    workers = Workers.launched()
    weights, run, left_out = args.out / "clip.safetensors", EvaluatedRun(), LeftOut()
    kept = args.out / "training.pt" if args.checkpoint_every else None
    started = time.perf_counter()
    quiet_pillow()  # also in this process, which decodes with --workers 0
    with exits_when_interrupted(run, weights, kept, workers):
        try:
            device = workers.device(args.device)
            # All ranks raise the same errors, except those about a GPU of their own.
            options.quiet &= device == args.device
            device = checked_device(device)
            options.quiet = workers.local_rank > 0
            if importlib.util.find_spec("matplotlib") is None:  # the figure needs it at the end
                raise ValueError("needs the package matplotlib: pip install matplotlib")
            workers.sizes(args.batch_size)
            config_of(args, 1)
            pairs = read_pairs(args.pairs, left_out, args.image_column, args.caption_column)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            options.error(str(error))
        with workers.group(device):
            try:
                workers.from_first(lambda: writable_folder(args.out))
                task = Task.load(args, pairs, left_out, device, workers)
                start = task.start()
                checkpoint = task.checkpoint()
                state = workers.from_first(
                    lambda: state_to_continue(checkpoint, args.resume, workers)
                )
            except (OSError, ValueError) as error:
                options.error(str(error))
            held_out, found = train_and_evaluate(task, start, run, weights, checkpoint, state)
        if workers.first:
            write_results(task, run, held_out, found, started)
            if args.checkpoint_every or state is not None:
                checkpoint.remove()
