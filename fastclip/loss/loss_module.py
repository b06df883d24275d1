"""The options that every loss has as a module."""

from __future__ import annotations

import torch.distributed as dist

from .holds_group import HoldsGroup


class LossModule(HoldsGroup):
    """A loss as a module, in one process or across ranks.

    Args:
        normalize, backend, memory_budget: as in `clip_loss`.
        across_ranks: True computes this rank's share of the loss of all ranks' batches; the mean
            over ranks is the loss of the whole batch.
        process_group, ring, uneven: as in `fastclip.distributed.clip_loss`.
    """

    def __init__(
        self,
        *,
        normalize: bool = False,
        backend: str | None = None,
        memory_budget: int | None = None,
        across_ranks: bool = False,
        process_group: dist.ProcessGroup | None = None,
        ring: bool = False,
        uneven: bool = False,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.backend = backend
        self.memory_budget = memory_budget
        self.across_ranks = across_ranks
        self.process_group = process_group
        self.ring = ring
        self.uneven = uneven

    def extra_repr(self) -> str:
        """The options, without those that are None."""
        return ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "training" and value is not None
        )
