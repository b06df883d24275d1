"""The command line of the demo."""

import argparse
from collections.abc import Collection
from pathlib import Path

from ..clip.views import FUSIONS
from ..command_line import OneLineParser, positive


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def rate_of_learning(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


# argparse names these in its message if the text is not a number.
not_negative.__name__ = "whole number"
rate_of_learning.__name__ = "number"


def parser(losses: Collection[str], implementations: Collection[str]) -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m fastclip.train",
        description="Train a small CLIP on 1,906 emoji drawn by two vendors, on the CPU, in "
        "minutes. Report retrieval and zero-shot accuracy on emoji held out of training.",
        epilog="Writes clip.safetensors, results.json, demo.png and retrieval.png. Ctrl-C "
        "saves the current model, and training.pt for --resume. For a run of seconds: --steps 4 "
        "--batch-size 32. For several processes, with --device cuda one per GPU: "
        "torchrun --nproc-per-node 2 -m fastclip.train",
    )
    p.add_argument(
        "--steps", type=positive, default=900, help="optimiser steps (default %(default)s)"
    )
    p.add_argument(
        "--batch-size",
        type=positive,
        default=256,
        help="pairs per step, summed over all processes (default %(default)s)",
    )
    p.add_argument(
        "--micro-batch",
        type=positive,
        help="pairs that the towers of a process hold at once, which then run twice per step "
        "(default: all of them at once, once per step)",
    )
    p.add_argument(
        "--lr",
        type=rate_of_learning,
        default=1e-3,
        help="peak learning rate (default %(default)s)",
    )
    p.add_argument(
        "--loss",
        choices=losses,
        default="clip",
        help="clip_ids: without the negatives that have an equal caption; siglip: each pair by "
        "itself, with a learnt bias; info_nce: pictures pick their captions, one way; supcon, "
        "nt_xent: pictures and captions are views of one concept; ranking: VSE++'s, of the hardest "
        "negatives; devise: the picture tower learns frozen text features, sums of random token "
        "vectors; global: with moving averages of each drawing's negatives (default %(default)s)",
    )
    p.add_argument(
        "--matching",
        choices=("none", *FUSIONS),
        default="none",
        help="also train a head that tells whether a picture and a caption match; it joins the "
        "inputs of the towers (early), their outputs (middle) or their features (late). Negatives "
        "are drawn from the loss's softmax, under torchrun among a process's own pairs "
        "(default %(default)s)",
    )
    p.add_argument(
        "--implementation",
        choices=implementations,
        default="fused",
        help="implementation of the loss to train with (default %(default)s)",
    )
    p.add_argument(
        "--no-compare", action="store_true", help="skip the run with the other implementation"
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of weights, batches and augmentation (default %(default)s)",
    )
    p.add_argument(
        "--device",
        default="cpu",
        help="where to train: cpu, cuda, cuda:1, ...; under torchrun cpu or cuda, which gives "
        "each process a GPU of its own (default %(default)s)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        help="output folder, created if missing (default %(default)s, with --pairs trained)",
    )
    p.add_argument(
        "--checkpoint-every",
        type=not_negative,
        default=100,
        metavar="STEPS",
        help="write the state of the training to training.pt in the output folder after every "
        "STEPS steps and at Ctrl-C; 0: never. A finished run removes it (default %(default)s)",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="continue from training.pt, with the same settings. The loss curve equals that of an "
        "uninterrupted run bit for bit; with another number of processes, and without --matching, "
        "up to rounding. Restarts by torchrun resume without this option. The comparison starts "
        "from its first step",
    )
    return p


def writable_folder(path: Path) -> Path:
    """Creates the folder and returns it. Raises OSError if no file can be written there."""
    path.mkdir(parents=True, exist_ok=True)
    probe = path / ".writable"
    probe.touch()
    probe.unlink()
    return path
