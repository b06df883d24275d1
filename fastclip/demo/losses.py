"""The losses to train with: by name, fused or dense, on one process or across ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from .. import loss as fused
from .. import reference as dense
from .batch import Batch
from .matching import MatchingLoss
from .workers import ALONE, Workers


class Pairs(NamedTuple):
    """The ids of a batch's pairs: equal captions have equal ids, and each sample of the dataset has
    an id of its own."""

    captions: Tensor
    samples: Tensor


# Each takes `of`, which maps a name in `fastclip.loss` to the function to call, then the ids of the
# pairs and the outputs of the model.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "clip": lambda of, pairs, x, y, scale: of("clip_loss")(x, y, scale),
    "clip_ids": lambda of, pairs, x, y, scale: of("clip_loss")(x, y, scale, ids=pairs.captions),
    "siglip": lambda of, pairs, x, y, scale, bias: of("siglip_loss")(x, y, scale, bias),
    # Pictures and captions are views of one concept.
    "supcon": lambda of, pairs, x, y, scale: of("supcon_loss")(
        torch.cat((x, y)), pairs.captions.repeat(2), scale
    ),
    "nt_xent": lambda of, pairs, x, y, scale: of("nt_xent_loss")(x, y, scale),
    "info_nce": lambda of, pairs, x, y, scale: of("info_nce")(x, y, scale),
    # The loss has no scale, but DDP waits for the gradient of the model's.
    "ranking": lambda of, pairs, x, y, scale: of("ranking_loss")(x, y, hardest=True) + 0 * scale,
    # The text side is frozen: only pictures have hinges.
    "devise": lambda of, pairs, x, y, scale: (
        of("ranking_loss")(x, y, margin=0.1, symmetric=False) + 0 * scale
    ),
    "global": lambda of, pairs, x, y, scale: of("GlobalClipLoss")(x, y, scale, pairs.samples),
}
# The initial values that a model needs for a loss, as in open_clip.
INITIAL: dict[str, dict[str, float]] = {"siglip": {"scale": 10.0, "bias": -10.0}}
IMPLEMENTATIONS = ("fused", "dense")
RHO = 6.5  # of the global loss, as in FastCLIP


class BatchLoss(nn.Module):
    """A loss of batches that are divided among the workers. "global" has buffers.

    Args:
        loss: a name of LOSSES.
        implementation: "fused" or "dense".
        samples: the number of samples in the dataset.
        batch_size: the pairs of all workers together.
        matching: the loss of a matching head, which is added.
    """

    def __init__(
        self, loss: str, implementation: str, samples: int, batch_size: int,
        workers: Workers = ALONE, matching: MatchingLoss | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.loss, self.matching = LOSSES[loss], matching
        self.dense = implementation == "dense"
        self.sizes = workers.sizes(batch_size)
        # The dense loss needs the whole batch on every rank.
        self.rows = slice(None) if self.dense else workers.rows(batch_size)
        self.own = workers.rows(batch_size) if self.dense else slice(None)  # among `rows`
        self.across: dict[str, Any] = {}
        if workers.size > 1 and not self.dense:
            self.across = {"uneven": len(set(self.sizes)) > 1}
        if loss == "global":
            self.averages = fused.GlobalClipLoss(
                samples, rho=RHO, backend="reference" if self.dense else None,
                across_ranks=bool(self.across), **self.across,
            )  # fmt: skip

    def forward(
        self, batch: Batch, image_features: Tensor, text_features: Tensor,
        image_view: Tensor | None = None, text_view: Tensor | None = None, **shared: Tensor,
    ) -> Tensor:  # fmt: skip
        """The loss of a model's outputs for a batch; `shared` are the scale, and the bias if the
        model has one. The views are for a matching head."""
        towers = image_features, text_features
        if self.dense and len(self.sizes) > 1:
            towers = self._whole(*towers)
        pairs = self._pairs(batch, image_features.device)
        loss = self.loss(self._function, pairs, *towers, *shared.values())
        if self.matching is None:
            return loss
        outputs = {
            "image_features": image_features, "text_features": text_features,
            "image_view": image_view, "text_view": text_view, **shared,
        }  # fmt: skip
        return loss + self.matching(outputs, batch.tokens, pairs.captions[self.own])

    def _function(self, name: str) -> Callable[..., Tensor]:
        if name == "GlobalClipLoss":
            return self.averages
        if self.across:
            return partial(getattr(distributed, name), **self.across)
        return getattr(dense if self.dense else fused, name)

    def _pairs(self, batch: Batch, device: torch.device) -> Pairs:
        known: dict[str, int] = {}
        captions = [known.setdefault(caption, len(known)) for caption in batch.captions]
        ids = captions, batch.samples
        return Pairs(*(torch.tensor(numbers[self.rows]).to(device) for numbers in ids))

    def _whole(self, *towers: Tensor) -> list[Tensor]:
        """All ranks' rows, with gradients."""
        most = max(self.sizes)
        padded = (F.pad(x, (0, 0, 0, most - len(x))) for x in towers)  # sizes must be equal
        gathered = distributed.gather_features(*padded, gather_with_grad=True)
        return [
            torch.cat([r[:size] for r, size in zip(x.split(most), self.sizes, strict=True)])
            for x in gathered
        ]
