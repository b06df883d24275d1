"""The demo's command line, and its one-line error messages."""

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import IO, NoReturn

import torch


class OneLineParser(argparse.ArgumentParser):
    """Answers a wrong option with one line instead of the usage; `quiet` prints nothing."""

    quiet = False

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        if not self.quiet:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def steps_or_never(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def rate_of_learning(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


# argparse names these types in its message if the text is no number.
positive.__name__ = steps_or_never.__name__ = "whole number"
rate_of_learning.__name__ = "number"


def parser(losses: Collection[str]) -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m fastclip.train",
        description="Train a small CLIP on 1,906 emoji drawn by two vendors, on the CPU, in "
        "minutes; report retrieval and zero-shot accuracy on held-out emoji.",
        epilog="Writes clip.safetensors, results.json and demo.png into the output folder. Ctrl-C "
        "saves the model and training.pt, from which --resume continues. A run of seconds: "
        "--steps 4 --batch-size 32. With several processes, one a GPU with --device cuda: "
        "torchrun --nproc-per-node 2 -m fastclip.train",
    )
    p.add_argument(
        "--steps", type=positive, default=900, help="optimiser steps (default %(default)s)"
    )
    p.add_argument(
        "--batch-size",
        type=positive,
        default=256,
        help="pairs per step, in all processes together (default %(default)s)",
    )
    p.add_argument(
        "--micro-batch",
        type=positive,
        help="pairs that a process encodes at once; the towers then run twice (default: the batch)",
    )
    p.add_argument(
        "--lr",
        type=rate_of_learning,
        default=1e-3,
        help="highest learning rate (default %(default)s)",
    )
    p.add_argument(
        "--loss",
        choices=losses,
        default="fused",
        help="the loss to train with (default %(default)s)",
    )
    p.add_argument("--no-compare", action="store_true", help="skip the run with the other loss")
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of weights, batches and augmentation (default %(default)s)",
    )
    p.add_argument(
        "--device",
        default="cpu",
        help="where to train: cpu, cuda, cuda:1, ...; under torchrun: cpu, or cuda for a GPU each "
        "(default %(default)s)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        help="output folder, made if missing (default %(default)s)",
    )
    p.add_argument(
        "--checkpoint-every",
        type=steps_or_never,
        default=100,
        metavar="STEPS",
        help="steps between writes of training.pt into the output folder; 0: never, not at Ctrl-C "
        "either. A run that ends removes it (default %(default)s)",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run from training.pt, with the same settings. The curve is "
        "that of an unbroken run bit for bit, or up to rounding with another number of processes. "
        "torchrun's own restarts resume by themselves. The comparison starts again",
    )
    return p


def checked_device(text: str) -> torch.device:
    """Returns the device after a test allocation; raises ValueError if that fails."""
    try:
        device = torch.device(text)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use device {text!r}: {str(error).splitlines()[0]}") from None
    return device


def writable_folder(path: Path) -> Path:
    """Creates the folder and tests that it can be written; raises OSError if not."""
    path.mkdir(parents=True, exist_ok=True)
    probe = path / ".writable"
    probe.touch()
    probe.unlink()
    return path
