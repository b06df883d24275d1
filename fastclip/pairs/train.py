"""Trains the thin CLIP on one's own pairs and evaluates it on a held-out share of them.

    python -m fastclip.train --pairs pairs.csv
    torchrun --nproc-per-node 2 -m fastclip.train --pairs pairs.csv    # the same curve

The loop, the losses, checkpoints and the division among processes are those of `fastclip.demo`.
"""

import argparse
import importlib.util
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..clip.model import CLIP, CLIPConfig
from ..clip.tokenizer import Tokenizer
from ..demo.checkpoint import Checkpoint
from ..demo.command_line import OneLineParser, checked_device, writable_folder
from ..demo.loop import Run
from ..demo.losses import INITIAL, BatchLoss
from ..demo.saving import (
    continuation,
    exits_when_interrupted,
    state_to_continue,
    train_and_save,
)
from ..demo.workers import Workers
from .batches import Batches
from .check import readable
from .command_line import SIZES
from .evaluate import HeldOut, features
from .images import Augmentation, chunks
from .pair import LeftOut, Pair, fingerprint, hold_out
from .source import read_pairs

# The options that determine the loss curve, beside the pairs and the tokenizer.
DECISIVE = (
    "steps", "batch_size", "micro_batch", "lr", "weight_decay", "loss", "implementation", "seed",
    "crop", "flip", "held_out", *SIZES,
)  # fmt: skip
SAMPLE = 1000  # held-out images that are evaluated during the training


@dataclass
class EvaluatedRun(Run):
    """A record with scores during the training: `evaluations[step]` by their names."""

    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.evaluations = dict(state["evaluations"])


@dataclass(frozen=True)
class Task:
    """The inputs of a training: options, pairs, tokenizer, model sizes, device."""

    args: argparse.Namespace
    trained: list[Pair]
    held_out: list[Pair]
    left_out: LeftOut
    tokenizer: Tokenizer
    tokenizer_text: str
    config: CLIPConfig
    device: torch.device
    workers: Workers

    @classmethod
    def load(
        cls, args: argparse.Namespace, pairs: Sequence[Pair], left_out: LeftOut,
        device: torch.device, workers: Workers,
    ) -> "Task":  # fmt: skip
        """Checks the images and learns the tokenizer.

        Raises:
            OSError, ValueError: no pair is usable, or an option does not fit the pairs. All ranks
                raise the same error.
        """
        usable = readable(pairs, args.image_size, left_out, workers, args.workers)
        if not usable:
            reasons = "; ".join(left_out.lines())
            raise ValueError(f"pairs must hold an image with a caption, {args.pairs} has none"
                             + (f": {reasons}" if reasons else ""))  # fmt: skip
        trained, held_out = hold_out(usable, args.held_out)
        if not trained:
            raise ValueError(
                f"held-out share must leave pairs to train on, got {args.held_out} of {len(usable)}"
            )
        text = workers.from_first(lambda: tokenizer_text(args, trained))
        tokenizer = tokenizer_of(text)
        return cls(
            args, trained, held_out, left_out, tokenizer, text,
            config_of(args, tokenizer.vocab_size), device, workers,
        )  # fmt: skip

    def encode(self, captions: Sequence[str]) -> Tensor:
        return self.tokenizer.encode(captions, self.config.context_length).to(self.device)

    def start(self) -> tuple[CLIP, Batches, BatchLoss]:
        """Returns an untrained model, its batches, and the loss of this rank's share of them."""
        args = self.args
        stream = Batches(
            self.trained, self.encode, args.batch_size, args.seed, args.image_size,
            Augmentation(args.crop, args.flip), device=self.device,
            rows=self.workers.rows(args.batch_size), processes=args.workers,
        )  # fmt: skip
        torch.manual_seed(args.seed)
        model = CLIP(self.config).to(self.device)
        samples = len(self.trained)
        loss = BatchLoss(args.loss, args.implementation, samples, args.batch_size, self.workers)
        return model, stream, loss.to(self.device)

    def checkpoint(self) -> Checkpoint:
        settings = {name: getattr(self.args, name) for name in DECISIVE}
        settings["pairs"] = fingerprint(self.trained, self.tokenizer_text)
        place = {
            "ranks": self.workers.size,
            "threads": torch.get_num_threads(),
            "device": self.args.device,
        }
        return Checkpoint(
            self.args.out / "training.pt", settings, place, self.args.checkpoint_every
        )

    def held_out_set(self, count: int | None = None) -> HeldOut:
        return HeldOut.of(self.held_out[:count], self.args.image_size)


def config_of(args: argparse.Namespace, vocab_size: int) -> CLIPConfig:
    sizes = {name: getattr(args, name) for name in SIZES}
    return CLIPConfig(**sizes, vocab_size=vocab_size, **INITIAL.get(args.loss, {}))


def tokenizer_text(args: argparse.Namespace, trained: Sequence[Pair]) -> str:
    """Returns the text of the tokenizer's file, which is given or learnt.

    Raises:
        OSError, ValueError: it cannot be read, or is no tokenizer of fastclip.
    """
    if args.tokenizer is None:
        captions = (caption for pair in trained for caption in pair.captions)
        tokenizer = Tokenizer.train(captions, args.vocab_size)
    else:
        tokenizer = _read_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        tokenizer.save(path)
        return path.read_text(encoding="utf-8")


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer must be a file, got no such file: {path}")
    try:
        tokenizer = Tokenizer(path)
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{path} must be a tokenizer.json of fastclip: {error}") from None
    if None in (tokenizer.pad, tokenizer.start, tokenizer.end):
        raise ValueError(f"{path} must be a tokenizer.json of fastclip, got another tokenizer")
    return tokenizer


def tokenizer_of(text: str) -> Tokenizer:
    """Returns the tokenizer of a file that another machine may have."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        path.write_text(text, encoding="utf-8")
        return Tokenizer(path)


def train_and_evaluate(
    task: Task, run: EvaluatedRun, weights: Path, checkpoint: Checkpoint,
    state: dict[str, Any] | None,
) -> tuple[HeldOut | None, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """Trains on all ranks; returns the held-out pairs with their features, None if there are
    none."""
    args, workers = task.args, task.workers
    say = print if workers.first else lambda *_, **__: None
    model, stream, loss = task.start()
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


def introduction(task: Task, model: CLIP) -> list[str]:
    """Returns lines about the data and the model."""
    captions = sum(len(pair.captions) for pair in task.trained)
    epochs = task.args.steps / (len(task.trained) // task.args.batch_size)
    ranks = f"{task.workers.size} ranks of " if task.workers.size > 1 else ""
    threads = torch.get_num_threads()
    return [
        *task.left_out.lines(),
        f"{len(task.trained):,} images with {captions:,} captions are trained on, "
        f"{len(task.held_out):,} images held out; {epochs:.1f} epochs; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{task.tokenizer.vocab_size:,} tokens; {ranks}{threads} thread"
        f"{'s' if threads > 1 else ''}",
        *cut_captions(task),
    ]


def cut_captions(task: Task) -> list[str]:
    """Returns a line if captions are longer than the model's; looks at the first 10,000."""
    captions = (caption for pair in task.trained for caption in pair.captions)
    looked_at = list(itertools.islice(captions, 10_000))
    longest = task.config.context_length
    cut = sum(
        # A row that is longer than the model's has no padding in the place after its last one.
        int((rows[:, longest:] != task.tokenizer.pad).any(dim=1).sum())
        for part in chunks(len(looked_at), 1000)
        for rows in [task.tokenizer.encode([looked_at[k] for k in part], 1 << 20)]
    )
    if not cut:
        return []
    return [f"{cut / len(looked_at):.1%} of captions are cut to --context-length {longest} tokens"]


def report(scores: dict[str, float], chance: dict[str, float], images: int, texts: int) -> str:
    """Returns the scores as a table for the terminal."""
    lines = ["", f"{images:,} held-out images and their {texts:,} different captions"]
    for name, value in scores.items():
        form = ".1%" if "@" in name else ",.1f"
        lines.append(
            f"  {name.replace('_', ' '):<26}{value:>8{form}}  (chance {chance[name]:{form}})"
        )
    return "\n".join(lines)


def write_results(
    task: Task, run: EvaluatedRun, held_out: HeldOut | None,
    found: tuple[Tensor, Tensor] | None, started: float,
) -> None:  # fmt: skip
    """Prints the scores; writes pairs.png and results.json."""
    from .figure import draw  # importing matplotlib takes a second

    args = task.args
    scores, chance = {}, {}
    if held_out and found:
        scores, chance = held_out.scores(found), held_out.chance()
        print(report(scores, chance, len(task.held_out), len(held_out.texts)), flush=True)
    draw(args.out / "pairs.png", run.losses, run.evaluations, held_out, found)
    seconds = time.perf_counter() - started
    results = {
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "ranks": task.workers.size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": {"total": seconds, "training": run.seconds},
        "images": {"trained": len(task.trained), "held_out": len(task.held_out)},
        "left_out": task.left_out.counts,
        "scores": scores,
        "chance": chance,
        "evaluations": run.evaluations,
        "losses": run.losses,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(
        f"\n{seconds:.0f} s in all; clip.safetensors, tokenizer.json, results.json and pairs.png "
        f"are in {args.out}/"
    )


def main(args: argparse.Namespace, options: OneLineParser) -> None:
    """Runs a training with the options that `options` parsed."""
    workers = Workers.launched()
    weights, run, left_out = args.out / "clip.safetensors", EvaluatedRun(), LeftOut()
    kept = args.out / "training.pt" if args.checkpoint_every else None
    started = time.perf_counter()
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
                task.start()
                checkpoint = task.checkpoint()
                state = workers.from_first(
                    lambda: state_to_continue(checkpoint, args.resume, workers)
                )
            except (OSError, ValueError) as error:
                options.error(str(error))
            held_out, found = train_and_evaluate(task, run, weights, checkpoint, state)
        if workers.first:
            write_results(task, run, held_out, found, started)
            if args.checkpoint_every or state is not None:
                checkpoint.remove()
