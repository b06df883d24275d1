"""The ends and the beginning of a training that writes to files: its model is saved however it
ends, and it continues from its checkpoint."""

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..clip.model import CLIP
from .batch import Stream
from .checkpoint import Checkpoint
from .interrupt import interruptible
from .loop import Run, train
from .losses import BatchLoss
from .workers import Workers


def state_to_continue(
    checkpoint: Checkpoint, resume: bool, workers: Workers
) -> dict[str, Any] | None:
    """Returns the state to continue from, or None for a training from its first step.

    A restart by torchrun continues by itself if the file is of this training.

    Raises:
        OSError, ValueError: as `Checkpoint.load`, if `resume`.
    """
    try:
        return checkpoint.load() if resume or workers.restarts else None
    except (OSError, ValueError):
        if resume:
            raise
        return None  # restarted before its first checkpoint: the file is from another training


def continuation(
    checkpoint: Checkpoint, state: Mapping[str, Any], steps: int, draws: bool = False
) -> str:
    """Returns in words where a training continues. draws: whether each rank draws negatives among
    its own pairs, for a matching head."""
    moved = checkpoint.place_changes(state)
    if moved and draws and "ranks" in moved:
        moved = f"; the head's negatives now come from other pairs: {moved}"
    elif moved:
        moved = f"; the curve is now the same up to rounding: {moved}"
    return f"continues after step {len(state['run']['losses'])} of {steps}{moved}"


def train_and_save(
    model: CLIP, stream: Stream, loss: BatchLoss, run: Run, weights: Path, notes: Mapping[str, str],
    *, workers: Workers, **options: Any,
) -> None:  # fmt: skip
    """Runs `loop.train` and writes the model to `weights`, also after Ctrl-C or an error."""
    with interruptible(patient=workers.under_torchrun) as stop_requested:
        try:
            train(
                model, stream, loss, run, workers=workers, stop_requested=stop_requested, **options
            )
        finally:
            # Before the first step the model is not saved, since the file may hold an earlier
            # run's model.
            if run.losses and workers.first:
                noted = {"steps": str(len(run.losses)), **notes}
                head = None if loss.matching is None else loss.matching.head
                model.save(weights, **noted) if head is None else head.save(weights, model, **noted)
                run.saved = True


@contextmanager
def exits_when_interrupted(
    run: Run, weights: Path, checkpoint: Path | None, workers: Workers
) -> Iterator[None]:
    """At Ctrl-C in the context, says in one line what was kept and exits.

    checkpoint: the file that the training continues from, None if it writes none.
    """
    try:
        yield
    except KeyboardInterrupt:
        if workers.under_torchrun:  # torchrun may send another one
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if workers.first:
            kept = f"{weights} holds the model so far" if run.saved else "nothing was saved"
            if run.saved and checkpoint is not None and checkpoint.is_file():
                kept += f"; --resume continues from {checkpoint.name}"
            print(f"\nstopped after {len(run.losses)} steps; {kept}", file=sys.stderr)
        sys.exit(130)
