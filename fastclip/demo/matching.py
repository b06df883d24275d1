"""The matching loss of a worker's own pairs, with hard negatives drawn anew in each step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..clip.matching import MatchingHead, matching_loss
from ..clip.model import CLIPConfig
from .workers import ALONE, Workers


class MatchingLoss(nn.Module):
    """The loss of a matching head that is trained beside the contrastive loss.

    Its state has the head's weights and the number of the step, which seeds the draw.

    Args:
        config: of the CLIP.
        fusion: of the head.
        batch_size: the pairs of all workers together.
        seed: of the head's first weights and of the negatives.
        workers: each draws negatives among its own pairs, and the mean of their losses is that of
            all pairs.

    Raises:
        ValueError: a worker has a single pair, which has no negative.
    """

    step: Tensor

    def __init__(
        self, config: CLIPConfig, fusion: str, batch_size: int, seed: int, workers: Workers = ALONE
    ) -> None:
        super().__init__()
        check_pairs(batch_size, workers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = MatchingHead(config, fusion)
        self.seed = seed
        self.share = workers.sizes(batch_size)[workers.rank] * workers.size / batch_size
        self.register_buffer("step", torch.tensor(0))

    def forward(self, outputs: Mapping[str, Tensor], tokens: Tensor, ids: Tensor) -> Tensor:
        """Returns this worker's share of the loss. The arguments are those of `matching_loss`."""
        loss = matching_loss(self.head, outputs, tokens, ids=ids, seed=self._next_seed())
        return self.share * loss

    def _next_seed(self) -> int:
        self.step += 1
        return (self.seed * 1_000_003 + self.step.item()) % 2**63


def check_pairs(batch_size: int, workers: Workers) -> None:
    """Raises ValueError if a worker has fewer than two pairs."""
    if min(workers.sizes(batch_size)) < 2:
        raise ValueError(
            f"batch size must be at least 2 for each of {workers.size} ranks to draw negatives "
            f"from, got {batch_size}"
        )
