"""The registry of losses: everything that the benchmark must know about a loss is a field of it.

Functions of fastclip and classes of open_clip are given by name and imported when they are called,
because `bench.gpu` starts before fastclip is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .measure import truth
from .methods import dense

if TYPE_CHECKING:
    from fastclip import LineStatistics


class Rival(NamedTuple):
    """open_clip's loss class across processes, the baseline of `bench.distributed`."""

    label: str  # in tables
    options: dict[str, Any]  # besides rank and world_size


class Loss(NamedTuple):
    """One loss of the benchmark."""

    label: str  # in tables
    function: str  # of fastclip.loss, fastclip.reference and fastclip.distributed
    module: str  # of open_clip.loss
    kind: str  # of fastclip.kinds
    on_lines: Callable[[LineStatistics], Tensor]  # the loss, written on `fastclip.contrast`
    dense: Callable[..., Tensor]
    checkpointed: Callable[..., Tensor]
    truth: Callable[..., truth.Truth]
    # open_clip's losses across processes, by method; the first is the baseline of all methods.
    rivals: dict[str, Rival]
    # Weights need no state: one sweep computes the loss and its gradients, and keeps no products.
    in_one_go: bool
    # How many logit matrices open_clip and the checkpointed loss compute: 2 if one per direction.
    directions: int
    bias: float | None = None  # the initial bias of training, if the loss has one
    rectangular: bool = False  # True if rectangular.py implements it

    def of_fastclip(self, module: str = "loss") -> Callable[..., Tensor]:
        """The function of fastclip.loss, fastclip.reference or fastclip.distributed."""
        return getattr(importlib.import_module(f"fastclip.{module}"), self.function)

    def bias_on(self, device: str) -> Tensor | None:
        return None if self.bias is None else torch.tensor(self.bias, device=device)


def _clip_on_lines(c: LineStatistics) -> Tensor:
    return (F.softplus(c.rows - c.positives) + F.softplus(c.columns - c.positives)).mean() / 2


def _siglip_on_lines(c: LineStatistics) -> Tensor:
    return (F.softplus(-c.positives) + (c.rows + c.columns) / 2).mean()


LOSSES: dict[str, Loss] = {
    "clip": Loss(
        "CLIP", "clip_loss", "ClipLoss", "softmax", _clip_on_lines,
        dense.dense_clip, dense.checkpointed_clip, truth.clip,
        rivals={
            "open_clip": Rival(
                "open_clip, local loss", {"local_loss": True, "gather_with_grad": True}
            )
        },
        in_one_go=False, directions=2, rectangular=True,
    ),
    "siglip": Loss(
        "SigLIP", "siglip_loss", "SigLipLoss", "sigmoid", _siglip_on_lines,
        dense.dense_siglip, dense.checkpointed_siglip, truth.siglip,
        rivals={
            "open_clip": Rival("open_clip, bidir", {"dist_impl": "bidir"}),  # its default
            "open_clip gather": Rival("open_clip gather", {"dist_impl": "gather"}),
        },
        in_one_go=True, directions=1, bias=-10.0,
    ),
}  # fmt: skip


def loss_of(name: str) -> Loss:
    """The registry's entry. Raises ValueError for an unknown name."""
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {name!r}")
    return LOSSES[name]
