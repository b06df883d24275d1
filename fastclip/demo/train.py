"""The demo: trains a small CLIP on emoji with the fused loss and evaluates it.

    python -m fastclip.train
    torchrun --nproc-per-node 2 -m fastclip.train    # the same curve

The pictures and names are real, and no network is needed. The evaluation uses drawings and concepts
that were held out of training (`fastclip/demo/emoji/split.py` says which). The first quarter of the
training then runs again with the dense loss and the same seed: the two curves must agree, up to
rounding. A matching head draws negatives, and rounding may move a draw.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..clip.bag_of_tokens import freeze_as_bag_of_tokens
from ..clip.model import CLIP, CLIPConfig
from ..clip.tokenizer import Tokenizer
from ..command_line import checked_device
from . import emoji as emoji_data
from .checkpoint import Checkpoint, place_of
from .command_line import parser, writable_folder
from .emoji.batches import Batches
from .emoji.evaluate import Score, as_json, evaluate, held_out_features
from .emoji.evaluate_matching import evaluate_matching
from .emoji.split import Split, split
from .interrupt import interruptible
from .loop import Run, train
from .losses import IMPLEMENTATIONS, INITIAL, LOSSES, BatchLoss
from .matching import MatchingLoss, check_pairs
from .saving import continuation, exits_when_interrupted, state_to_continue, train_and_save
from .workers import ALONE, Workers

# The options that determine the loss curve.
DECISIVE = (
    "steps", "batch_size", "micro_batch", "lr", "loss", "matching", "implementation", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """The inputs of a run apart from its options: data, split, tokenizer, model sizes, device.

    loss: the loss to train with, of LOSSES.
    matching: the fusion of a matching head, or "none".
    """

    emoji: emoji_data.Emoji
    split: Split
    tokenizer: Tokenizer
    config: CLIPConfig
    device: torch.device
    workers: Workers = ALONE
    loss: str = "clip"
    matching: str = "none"

    @classmethod
    def load(cls, device: torch.device | str = "cpu", workers: Workers = ALONE) -> "Task":
        data = emoji_data.load()
        tokenizer = Tokenizer(emoji_data.TOKENIZER)
        config = CLIPConfig(image_size=emoji_data.SIZE, vocab_size=tokenizer.vocab_size)
        return cls(data, split(data.concepts), tokenizer, config, torch.device(device), workers)

    def encode(self, captions: Sequence[str]) -> Tensor:
        return self.tokenizer.encode(captions, self.config.context_length).to(self.device)

    def start(self, seed: int, batch_size: int) -> tuple[CLIP, Batches]:
        """Returns an untrained model and its batches. Both depend on the seed alone."""
        if self.matching != "none":
            check_pairs(batch_size, self.workers)
        rows = self.workers.rows(batch_size)
        stream = Batches(self.emoji, self.split, self.encode, batch_size, seed, self.device, rows)
        torch.manual_seed(seed)
        config = replace(self.config, **INITIAL.get(self.loss, {}))
        model = CLIP(config)
        if self.loss == "devise":
            freeze_as_bag_of_tokens(model)
        return model.to(self.device), stream

    def batch_loss(self, implementation: str, batch_size: int, seed: int = 0) -> BatchLoss:
        """Returns the loss of this worker's share of the batches. `seed` is for a matching head."""
        samples = len(self.emoji.concepts) * len(emoji_data.VENDORS)
        matching = None
        if self.matching != "none":
            matching = MatchingLoss(self.config, self.matching, batch_size, seed, self.workers)
        loss = BatchLoss(self.loss, implementation, samples, batch_size, self.workers, matching)
        return loss.to(self.device)


def trained_parameters(*modules: nn.Module) -> int:
    """Returns the number of parameters that are not frozen."""
    return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)


def report(scores: dict[str, dict[str, Score]], task: Task) -> str:
    """Returns the scores as a table for the terminal."""
    titles = {
        "other vendor": f"{len(task.split.one_vendor)} trained concepts, in the drawing of the "
        "vendor that was not trained on",
        "held out": f"{len(task.split.held_out)} concepts held out of training, names and drawings",
        "zero-shot": "the same held-out drawings, classified into categories by words alone",
    }
    width = 2 + max(len(name) for figures in scores.values() for name in figures)
    lines = []
    for test, figures in scores.items():
        lines += ["", titles[test]]
        lines += [f"  {name:<{width}}{score}" for name, score in figures.items()]
    return "\n".join(lines)


def train_and_evaluate(
    args: argparse.Namespace, task: Task, model: CLIP, stream: Batches, runs: dict[str, Run],
    weights: Path, checkpoint: Checkpoint, state: dict[str, Any] | None,
) -> dict[str, dict[str, Score]]:  # fmt: skip
    """Trains with both implementations on all ranks; the first rank saves, evaluates and reports.
    Returns the scores, which other ranks do not have.

    `model` and `stream` are from `task.start`; those of the second run are made here.
    `runs`, by implementation, is filled step by step, so that it is complete even after an
    interruption.
    """
    workers = task.workers
    say = print if workers.first else lambda *_, **__: None
    first, other = runs
    loss = task.batch_loss(first, args.batch_size, args.seed)
    head = None if loss.matching is None else loss.matching.head
    schedule = {"steps": args.steps, "lr": args.lr, "micro_batch": args.micro_batch}
    ranks = f"{workers.size} ranks of " if workers.size > 1 else ""
    threads = torch.get_num_threads()
    say(
        f"{len(task.split.vendors):,} of {len(task.split.members):,} look-alike groups of emoji "
        f"are trained on; {trained_parameters(model, loss) / 1e6:.1f} M parameters; "
        f"{ranks}{threads} thread{'s' if threads > 1 else ''}"
    )
    if state is not None:
        say(continuation(checkpoint, state, args.steps, draws=head is not None))
    train_and_save(
        model, stream, loss, runs[first], weights,
        {"tokenizer": "fastclip/demo/emoji/tokenizer.json"}, label=f"{first} loss",
        workers=workers, checkpoint=checkpoint, state=state, **schedule,
    )  # fmt: skip
    scores = {}
    if workers.first:
        scores = evaluate(model, task.emoji, task.split, task.encode)
        if head is not None:
            for test, found in evaluate_matching(
                head, model, task.emoji, task.split, task.encode
            ).items():
                scores[test] |= found
        say(report(scores, task), flush=True)
    if not args.no_compare:
        twin, stream = task.start(args.seed, args.batch_size)
        say(
            f"\nThe first quarter of the training again, with the {other} loss and the same seed:",
            flush=True,
        )
        with interruptible(patient=workers.under_torchrun) as stop_requested:
            train(
                twin, stream, task.batch_loss(other, args.batch_size, args.seed), runs[other],
                stop=max(1, args.steps // 4), label=f"{other} loss", workers=workers,
                stop_requested=stop_requested, **schedule,
            )  # fmt: skip
        gap = max(abs(a - b) for a, b in zip(*(r.losses for r in runs.values()), strict=False))
        say(f"largest difference between the two losses at any step: {gap:.1e}")
    return scores


def write_results(
    args: argparse.Namespace, task: Task, runs: dict[str, Run], weights: Path, model: CLIP,
    scores: dict[str, dict[str, Score]], started: float,
) -> None:  # fmt: skip
    """Writes results.json, demo.png and retrieval.png."""
    # Importing matplotlib takes a second.
    from .emoji import figure, retrieval_figure

    runs = {name: run for name, run in runs.items() if run.losses}
    losses = {name: r.losses for name, r in runs.items()}
    seconds = time.perf_counter() - started
    results = {
        "settings": {**vars(args), "out": str(args.out)},
        "ranks": task.workers.size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": {"total": seconds, **{name: r.seconds for name, r in runs.items()}},
        "scores": as_json(scores),
        "losses": losses,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    # After the results, which a figure that fails must not lose.
    held = held_out_features(model, task.emoji, task.split, task.encode)
    figure.draw(args.out / "demo.png", losses, task.emoji, held)
    retrieval_figure.draw(args.out / "retrieval.png", task.emoji, held)
    print(
        f"\n{seconds:.0f} s in all; demo.png, retrieval.png, results.json and {weights.name} are "
        f"in {args.out}/"
    )


def main(argv: Sequence[str] | None = None) -> None:
    workers = Workers.launched()
    options = parser(LOSSES, IMPLEMENTATIONS)
    options.quiet = workers.local_rank > 0
    args = options.parse_args(argv)
    weights = args.out / "clip.safetensors"
    # The chosen implementation comes first.
    first = args.implementation
    runs = {name: Run() for name in sorted(IMPLEMENTATIONS, key=lambda name: name != first)}
    checkpoint = Checkpoint(
        args.out / "training.pt", {name: getattr(args, name) for name in DECISIVE},
        place_of(workers.size, args.device), args.checkpoint_every,
    )  # fmt: skip

    def prepared() -> dict[str, Any] | None:
        """Returns the state to continue from, if any, once `args.out` is known to be writable."""
        writable_folder(args.out)
        return state_to_continue(checkpoint, args.resume, workers)

    kept = checkpoint.path if checkpoint.every else None
    with exits_when_interrupted(runs[first], weights, kept, workers):
        try:
            device = workers.device(args.device)
            # All ranks raise the same errors, except those about a GPU of their own.
            options.quiet &= device == args.device
            task = Task.load(checked_device(device), workers)
            task = replace(task, loss=args.loss, matching=args.matching)
            options.quiet = workers.local_rank > 0
            model, stream = task.start(args.seed, args.batch_size)
        except (OSError, ValueError) as error:
            options.error(str(error))
        with workers.group(task.device):
            try:
                state = workers.from_first(prepared)
            except (OSError, ValueError) as error:
                options.error(str(error))
            started = time.perf_counter()
            scores = train_and_evaluate(args, task, model, stream, runs, weights, checkpoint, state)
        if workers.first:
            write_results(args, task, runs, weights, model, scores, started)
            if args.checkpoint_every or state is not None:
                checkpoint.remove()


if __name__ == "__main__":
    main()
