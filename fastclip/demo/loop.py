"""The training loop: optimiser, schedule, steps and the record of a run.

This file reads no data and prints only a progress bar.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..cached import cached_step
from ..clip.model import CLIP
from ..clip.views import WithViews
from .batch import Stream
from .checkpoint import Checkpoint, restore
from .losses import BatchLoss
from .workers import ALONE, Workers


@dataclass
class Run:
    """The record of a training run: the loss and the scale of every step so far, seconds spent.

    `saved`: whether the run's model was written to a file.
    """

    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    seconds: float = 0.0
    saved: bool = False

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.scales = list(state["losses"]), list(state["scales"])
        self.seconds = state["seconds"]


def optimizer_for(model: nn.Module, lr: float, weight_decay: float = 1.0) -> torch.optim.Optimizer:
    """Returns AdamW. Matrices have the weight decay; the vectors of layer norms, biases and the
    scale have none. The default is strong because the demo has few pictures."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def rate(step: int, steps: int) -> float:
    """Returns the factor of the learning rate: a linear warm-up, then half a cosine."""
    warm_up = max(1, min(50, steps // 10))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    model: CLIP,
    stream: Stream,
    loss: BatchLoss,
    run: Run,
    *,
    steps: int,
    lr: float,
    weight_decay: float = 1.0,
    stop: int | None = None,
    micro_batch: int | None = None,
    label: str = "",
    workers: Workers = ALONE,
    checkpoint: Checkpoint | None = None,
    state: dict[str, Any] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    after_step: Callable[[int], None] = lambda done: None,
) -> None:
    """Trains for the first `stop` of the schedule's `steps` (default: all) and writes the record of
    every step to `run`.

    Args:
        micro_batch: pairs that the towers hold at once; default: all pairs of this worker.
        checkpoint: is written every `checkpoint.every` steps, after the last step, and when a stop
            was requested.
        state: from `Checkpoint.load`; the training continues after its last step.
        stop_requested: is called after each step. If it returns True on any rank, all ranks raise
            KeyboardInterrupt at the end of that step.
        after_step: is called on every rank with the number of steps done, before a checkpoint.
    """
    trained = nn.ModuleList([model, loss])  # a loss may have a matching head
    optimizer = optimizer_for(trained, lr, weight_decay)
    parts = {"model": model, "loss": loss, "optimizer": optimizer, "batches": stream, "run": run}
    if state is not None:
        restore(state, parts)
    saves = checkpoint is not None and checkpoint.every > 0 and workers.first
    head = None if loss.matching is None else loss.matching.head
    towers = workers.wrap(model, None if head is None else WithViews(model, head.fusion))
    trained.train()
    stop, begun, spent = steps if stop is None else stop, len(run.losses), run.seconds
    with tqdm(
        total=stop, initial=begun, desc=label, unit="step", dynamic_ncols=True,
        disable=not (label and workers.first),
    ) as bar:  # fmt: skip
        started = time.perf_counter()
        for step in range(begun, stop):
            batch = next(stream)
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, steps)
            optimizer.zero_grad()
            pairs, of_batch = (batch.images, batch.tokens), partial(loss, batch)
            if micro_batch is None:
                value = of_batch(**towers(*pairs))
                value.backward()
            else:
                value = cached_step(towers, of_batch, *pairs, micro_batch=micro_batch)
            workers.average(loss.parameters())
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            model.clamp_logit_scale()
            batch_loss, stopping = workers.over_all_ranks(value, stop_requested())
            run.losses.append(batch_loss)
            run.scales.append(model.logit_scale.exp().item())
            run.seconds = spent + time.perf_counter() - started
            speed = len(run.losses) * len(batch.captions) / run.seconds
            bar.set_postfix_str(
                f"loss {run.losses[-1]:.3f}, scale {run.scales[-1]:.1f}, {speed:,.0f} pairs/s",
                refresh=False,
            )
            bar.update()
            done = step + 1
            after_step(done)
            if saves and (stopping or done == stop or done % checkpoint.every == 0):
                checkpoint.save(parts)
            if stopping:
                raise KeyboardInterrupt
