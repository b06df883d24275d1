"""Prints and writes a training's data, scores, results and figure."""

import itertools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..clip.model import CLIP
from ..demo.loop import Run
from .evaluate import HeldOut
from .images import chunks
from .task import Task


@dataclass
class EvaluatedRun(Run):
    """A record with scores during the training: `evaluations[step]` by their names."""

    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.evaluations = dict(state["evaluations"])


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
    """Prints the scores; writes results.json and pairs.png."""
    from .figure import draw  # importing matplotlib takes a second

    args = task.args
    scores, chance = {}, {}
    if held_out and found:
        scores, chance = held_out.scores(found), held_out.chance()
        print(report(scores, chance, len(task.held_out), len(held_out.texts)), flush=True)
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
    # After the results, which a figure that fails must not lose.
    draw(args.out / "pairs.png", run.losses, run.evaluations, held_out, found)
    print(
        f"\n{seconds:.0f} s in all; clip.safetensors, tokenizer.json, results.json and pairs.png "
        f"are in {args.out}/"
    )
