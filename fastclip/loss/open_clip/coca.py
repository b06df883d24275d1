"""open_clip's `CoCaLoss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .clip import ClipLoss


class CoCaLoss(ClipLoss):
    """open_clip's `CoCaLoss`: CLIP's loss, fused, and the cross-entropy of captions (Yu et al.,
    arXiv 2205.01917).

    Args:
        caption_loss_weight, clip_loss_weight: the factors of the two. With a clip_loss_weight of 0
            CLIP's loss is 0 and is not computed.
        pad_id: the label of tokens that do not count.
        options: those of `ClipLoss`.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        *arguments: Any,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logits: Tensor,  # (B, L, V)
        labels: Tensor,  # (B, L)
        logit_scale: Tensor | float,
        output_dict: bool = False,
        *,
        ids: tuple[Tensor, Tensor] | Tensor | None = None,
        weights: Tensor | None = None,  # (N,), of CLIP's loss
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(CLIP's loss, captions' loss), or `{"contrastive_loss": ..., "caption_loss": ...}`."""
        clip_loss = torch.tensor(0, device=logits.device)
        if self.clip_loss_weight:
            clip_loss = self.clip_loss_weight * super().forward(
                image_features, text_features, logit_scale, ids=ids, weights=weights
            )
        caption_loss = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": clip_loss, "caption_loss": caption_loss}
        return clip_loss, caption_loss
