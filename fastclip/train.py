"""Trains a small CLIP on emoji with the fused loss, and reports what it learnt: the demo.

    python -m fastclip.train

Real pictures, real names, no network. Then the same training again with the dense loss from the
same seed, whose curve must lie on the fused one's, and an evaluation on drawings and on concepts
that were kept from training (`fastclip/emoji/split.py` says which).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from . import emoji as emoji_data
from . import loss as fused
from . import reference as dense
from .cached import cached_step
from .emoji.batches import Batch, batches
from .emoji.evaluate import Score, as_json, evaluate, held_out
from .emoji.split import Split, split
from .model import CLIP, CLIPConfig
from .tokenizer import Tokenizer

LOSSES: dict[str, Callable[..., Tensor]] = {"fused": fused.clip_loss, "dense": dense.clip_loss}


@dataclass
class Run:
    """One training run as it goes: the loss and the scale of every step so far, seconds spent.

    `saved` says whether its checkpoint was written.
    """

    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    seconds: float = 0.0
    saved: bool = False


def optimizer_for(model: CLIP, lr: float) -> torch.optim.Optimizer:
    """AdamW, with a decay that suits few pictures; gains, biases and the scale are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 1.0}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def rate(step: int, steps: int) -> float:
    """The learning rate's factor: up in a straight line, then down along half a cosine."""
    warm_up = max(1, min(50, steps // 10))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    model: CLIP,
    stream: Iterator[Batch],
    loss: Callable[..., Tensor],
    run: Run,
    *,
    steps: int,
    lr: float,
    stop: int | None = None,
    micro_batch: int | None = None,
    label: str = "",
) -> None:
    """Trains for `stop` of the schedule's `steps` (all by default), keeping account in `run`. The
    towers hold `micro_batch` pairs at once, or the whole batch."""
    optimizer = optimizer_for(model, lr)
    model.train()
    stop = steps if stop is None else stop
    with tqdm(total=stop, desc=label, unit="step", dynamic_ncols=True, disable=not label) as bar:
        started = time.perf_counter()
        for step in range(stop):
            batch = next(stream)
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, steps)
            optimizer.zero_grad()
            pairs = batch.images, batch.tokens
            if micro_batch is None:
                value = loss(**model(*pairs))
                value.backward()
            else:
                value = cached_step(model, loss, *pairs, micro_batch=micro_batch)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.clamp_logit_scale()
            run.losses.append(value.item())
            run.scales.append(model.logit_scale.exp().item())
            run.seconds = time.perf_counter() - started
            speed = len(run.losses) * len(batch.images) / run.seconds
            bar.set_postfix_str(
                f"loss {run.losses[-1]:.3f}, scale {run.scales[-1]:.1f}, {speed:,.0f} pairs/s",
                refresh=False,
            )
            bar.update()


@dataclass(frozen=True)
class Task:
    """The data, its split, and the words: all that a run needs beside its settings."""

    emoji: emoji_data.Emoji
    split: Split
    tokenizer: Tokenizer
    config: CLIPConfig
    device: torch.device

    @classmethod
    def load(cls, device: torch.device | str = "cpu") -> "Task":
        data = emoji_data.load()
        tokenizer = Tokenizer(emoji_data.TOKENIZER)
        config = CLIPConfig(image_size=emoji_data.SIZE, vocab_size=tokenizer.vocab_size)
        return cls(data, split(data.concepts), tokenizer, config, torch.device(device))

    def encode(self, captions: Sequence[str]) -> Tensor:
        return self.tokenizer.encode(captions, self.config.context_length).to(self.device)

    def start(self, seed: int, batch_size: int) -> tuple[CLIP, Iterator[Batch]]:
        """A fresh model and its batches: both follow from the seed alone."""
        stream = batches(self.emoji, self.split, self.encode, batch_size, seed, self.device)
        torch.manual_seed(seed)
        return CLIP(self.config).to(self.device), stream


class OneLineParser(argparse.ArgumentParser):
    """A wrong option gets one line, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def rate_of_learning(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


# What argparse calls these where the text is no number at all.
positive.__name__, rate_of_learning.__name__ = "whole number", "number"


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m fastclip.train",
        description="Train a small CLIP on 1,906 emoji drawn by two vendors, on the CPU, in "
        "minutes; report retrieval and zero-shot accuracy on what was kept from training.",
        epilog="Writes clip.safetensors, results.json and demo.png into the output folder. Ctrl-C "
        "keeps the checkpoint as it is then. A run of seconds: --steps 4 --batch-size 32",
    )
    p.add_argument(
        "--steps", type=positive, default=900, help="optimiser steps (default %(default)s)"
    )
    p.add_argument(
        "--batch-size", type=positive, default=256, help="pairs per step (default %(default)s)"
    )
    p.add_argument(
        "--micro-batch",
        type=positive,
        help="pairs that the towers hold at once; they then run twice (default: the batch)",
    )
    p.add_argument(
        "--lr",
        type=rate_of_learning,
        default=1e-3,
        help="highest learning rate (default %(default)s)",
    )
    p.add_argument(
        "--loss",
        choices=LOSSES,
        default="fused",
        help="the loss to train with (default %(default)s)",
    )
    p.add_argument("--no-compare", action="store_true", help="skip the run with the other loss")
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of weights, batches and augmentation (default %(default)s)",
    )
    p.add_argument(
        "--device",
        default="cpu",
        help="where to train: cpu, cuda, cuda:1, ... (default %(default)s)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        help="output folder, made if missing (default %(default)s)",
    )
    return p


def checked_device(text: str) -> torch.device:
    """The device, once something was put on it. Raises ValueError where that fails."""
    try:
        device = torch.device(text)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use device {text!r}: {str(error).splitlines()[0]}") from None
    return device


def writable_folder(path: Path) -> Path:
    """The folder, made, once a file could be written there. Raises OSError where that fails."""
    path.mkdir(parents=True, exist_ok=True)
    probe = path / ".writable"
    probe.touch()
    probe.unlink()
    return path


def report(scores: dict[str, dict[str, Score]], task: Task) -> str:
    """The figures as a table for the terminal."""
    titles = {
        "other vendor": f"{len(task.split.one_vendor)} trained concepts, in the drawing of the "
        "vendor that was kept from training",
        "held out": f"{len(task.split.held_out)} concepts held out of training, names and drawings",
        "zero-shot": "the same held-out drawings into categories, from words alone",
    }
    lines = []
    for test, figures in scores.items():
        lines += ["", titles[test]]
        lines += [f"  {name:<18}{score}" for name, score in figures.items()]
    return "\n".join(lines)


def demo(args: argparse.Namespace, task: Task, run: Run, checkpoint: Path) -> None:
    """Train, save, evaluate, compare, draw; `run` tells how far it got when it is interrupted."""
    started = time.perf_counter()
    model, stream = task.start(args.seed, args.batch_size)
    schedule = {"steps": args.steps, "lr": args.lr, "micro_batch": args.micro_batch}
    print(
        f"{len(task.split.vendors):,} of {len(task.split.members):,} look-alike groups of emoji "
        f"are trained on; {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"{torch.get_num_threads()} threads"
    )
    try:
        train(model, stream, LOSSES[args.loss], run, label=f"{args.loss} loss", **schedule)
    finally:
        # Interrupted or not: what was learnt so far is worth keeping. Before the first step that
        # is nothing, and an earlier run's checkpoint may be there.
        if run.losses:
            model.save(
                checkpoint, steps=str(len(run.losses)), tokenizer="fastclip/emoji/tokenizer.json"
            )
            run.saved = True
    scores = evaluate(model, task.emoji, task.split, task.encode)
    print(report(scores, task), flush=True)

    runs = {args.loss: run}
    if not args.no_compare:
        other = next(name for name in LOSSES if name != args.loss)
        twin, stream = task.start(args.seed, args.batch_size)
        runs[other] = Run()
        stop = max(1, args.steps // 4)
        print(f"\nThe first quarter again, with the {other} loss and the same seed:", flush=True)
        train(
            twin, stream, LOSSES[other], runs[other], stop=stop, label=f"{other} loss", **schedule
        )
        gap = max(abs(a - b) for a, b in zip(*(r.losses for r in runs.values()), strict=False))
        print(f"largest difference between the two losses, step by step: {gap:.1e}")

    from .emoji.figure import draw  # matplotlib takes a second to import, and fonts to find

    held = held_out(model, task.emoji, task.split, task.encode)
    draw(args.out / "demo.png", {name: r.losses for name, r in runs.items()}, task.emoji, held)
    seconds = time.perf_counter() - started
    results = {
        "settings": {**vars(args), "out": str(args.out)},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": {"total": seconds, **{name: r.seconds for name, r in runs.items()}},
        "scores": as_json(scores),
        "losses": {name: r.losses for name, r in runs.items()},
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{seconds:.0f} s in all; demo.png, results.json, {checkpoint.name} are in {args.out}/")


def main(argv: Sequence[str] | None = None) -> None:
    options = parser()
    args = options.parse_args(argv)
    checkpoint = args.out / "clip.safetensors"
    run = Run()
    try:
        try:
            task = Task.load(checked_device(args.device))
            task.start(args.seed, args.batch_size)
            writable_folder(args.out)
        except (OSError, ValueError) as error:
            options.error(str(error))
        demo(args, task, run, checkpoint)
    except KeyboardInterrupt:
        kept = f"{checkpoint} holds the model so far" if run.saved else "nothing was saved"
        print(f"\nstopped after {len(run.losses)} steps; {kept}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
