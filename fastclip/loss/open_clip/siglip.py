"""open_clip's `SigLipLoss`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...distributed import gather_features
from ...distributed.agreement import check_world
from ...distributed.described import described
from ...distributed.gradient_mode import GradientMode
from ...distributed.local_negatives import warn_of_local_negatives
from ...distributed.losses import distributed_loss
from ...distributed.world import world_of_ranks
from ...formulas.needs_lines import check_no_live, needs_lines
from ...formulas.reduction import Reduction
from ...formulas.siglip import siglip
from ..holds_group import HoldsGroup
from ..siglip import siglip_loss
from .dense import backend_in_trace, open_clip_logits, overrides, refuse_live, refuse_options


class SigLipLoss(HoldsGroup):
    """open_clip's `SigLipLoss`, without parameters or buffers.

    If a subclass overrides `get_logits`, `get_ground_truth` or `_loss`, the loss is the dense loss
    of what they return, one rank's texts after another. It is dense in `torch.jit.trace`, too.

    Args:
        cache_labels: has no effect.
        rank, world_size: those of this process within `process_group`.
        dist_impl: how texts reach a rank: "bidir" (also None) and "shift" around a ring, "reduce"
            and "gather" by an all-gather. Values and gradients are the same.
        chunk_size: has no effect; memory is bounded without it.
        process_group, uneven: as in `fastclip.distributed.siglip_loss`.
        same_id, normalize, reduction, backend, memory_budget: as in `fastclip.siglip_loss`.

    Raises:
        ValueError: an unknown dist_impl; at a call, a rank or world size that is not the group's,
            live with ids or, across ranks, with a reduction other than "mean", and, in a subclass
            that makes its own logits, ids, live, normalize or such a reduction.
    """

    DIST_IMPLS = ("bidir", "shift", "reduce", "gather")

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        process_group: dist.ProcessGroup | None = None,
        uneven: bool = False,
        same_id: str = "ignore",
        normalize: bool = False,
        reduction: str = "mean",
        backend: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in self.DIST_IMPLS:
            raise ValueError(
                f"dist_impl must be None or one of {self.DIST_IMPLS}, got {dist_impl!r}"
            )
        self.chunk_size = chunk_size
        self.process_group = process_group
        self.uneven = uneven
        self.same_id = same_id
        self.normalize = normalize
        self.reduction = reduction
        self.backend = backend
        self.memory_budget = memory_budget
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """(num_logits, num_logits): 1 for positives, -1 for negatives."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Dense logits (N, N)."""
        return open_clip_logits(image_features, text_features, logit_scale, logit_bias)

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """open_clip's hook: the loss of one block of texts. It is dense for other ranks' texts
        (`negative_only`), and if a subclass makes its own logits or labels."""
        if not negative_only and not overrides(self, SigLipLoss):
            return siglip_loss(image_features, text_features, logit_scale, logit_bias)
        logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        n = image_features.shape[0]
        labels = self.get_ground_truth(
            image_features.device, image_features.dtype, n, negative_only=negative_only
        )
        return -F.logsigmoid(labels * logits).sum() / n

    def _dense_across(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
    ) -> Tensor:
        _, texts = gather_features(
            image_features, text_features, gather_with_grad=True, rank=self.rank,
            world_size=self.world_size, process_group=self.process_group,
        )  # fmt: skip
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        for rank, others in enumerate(texts.chunk(self.world_size)):
            if rank != self.rank:
                loss = loss + self._loss(
                    image_features, others, logit_scale, logit_bias, negative_only=True
                )
        return loss

    def _check_call(self, live: tuple[int, int] | None) -> None:
        check_no_live(live)
        check_world("SigLipLoss", self.rank, self.world_size, self.process_group)

    def _described(self, ids: Any, weights: Any) -> str:
        return described(
            "SigLipLoss", ids=ids, weights=weights, same_id=self.same_id, reduction=self.reduction
        )

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
        live: tuple[int, int] | None = None,
        ids: tuple[Tensor, Tensor] | Tensor | None = None,
        weights: Tensor | None = None,  # (N,)
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or `{"contrastive_loss": loss}`; live, ids and weights as in
        `fastclip.siglip_loss`, across ranks as in `fastclip.distributed.siglip_loss`."""
        inputs = (image_features, text_features, logit_scale, logit_bias)
        ring = self.dist_impl in ("bidir", "shift")
        options = {
            "ids": ids, "same_id": self.same_id, "weights": weights, "normalize": self.normalize,
            "reduction": self.reduction, "backend": self.backend,
            "memory_budget": self.memory_budget, "live": live,
        }  # fmt: skip
        if self.world_size == 1:
            warn_of_local_negatives(type(self).__name__, self.process_group)
        if overrides(self, SigLipLoss, ("_loss",)):
            refuse_live(live)
            refuse_options(
                "a subclass that makes its own logits", ids=ids is not None,
                weights=weights is not None, same_id=self.same_id != "ignore",
                normalize=self.normalize, reduction=self.reduction != "mean",
            )  # fmt: skip
            across = self._dense_across if self.world_size > 1 else self._loss
            loss = across(*inputs)
        elif self.world_size > 1 and needs_lines(ids, 0, weights, self.same_id, self.reduction):
            world = world_of_ranks(
                self._described(ids, weights), self.process_group, ring, self.uneven,
                self.normalize, self.backend, self.memory_budget,
            )  # fmt: skip
            world.guarded(lambda: self._check_call(live))
            loss = siglip(world, *inputs, ids, self.same_id, Reduction(self.reduction, weights))
        elif self.world_size > 1:
            mode = GradientMode(ring=ring)
            world = ("SigLipLoss", self.rank, self.world_size)
            loss = distributed_loss(
                "sigmoid", *inputs, self.process_group, mode, self.uneven,
                self._described(ids, weights), self.normalize, self.backend, self.memory_budget,
                live, world,
            )  # fmt: skip
        else:
            options["backend"] = backend_in_trace(self.backend)
            loss = siglip_loss(*inputs, **options)
        return {"contrastive_loss": loss} if output_dict else loss
