"""Layers of the Hub kernel: `forward` methods that replace those of existing modules.

Layers of the Hub have no constructor, no other method and no state. Options are read from the
module whose `forward` is replaced, if it has them: its attributes have the names of the options.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import loss as losses


def _options(module: nn.Module, *names: str) -> dict[str, Any]:
    """Returns the options that a module has as attributes."""
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


class ClipLoss(nn.Module):
    """open_clip's `ClipLoss`. Reads local_loss, gather_with_grad, rank and world_size."""

    can_torch_compile: bool = True

    def forward(
        self,
        image_features: Tensor,  # (N, D), normalised
        text_features: Tensor,  # (N, D), normalised
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        inputs = image_features, text_features, logit_scale, logit_bias
        if getattr(self, "world_size", 1) == 1:
            loss = losses.clip_loss(*inputs)
        else:
            names = "local_loss", "gather_with_grad", "rank", "world_size"
            loss = losses.ClipLoss(**_options(self, *names))(*inputs)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """open_clip's `SigLipLoss`. Reads rank, world_size and dist_impl."""

    can_torch_compile: bool = True

    def forward(
        self,
        image_features: Tensor,  # (N, D), normalised
        text_features: Tensor,  # (N, D), normalised
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        inputs = image_features, text_features, logit_scale, logit_bias
        if getattr(self, "world_size", 1) == 1:
            loss = losses.siglip_loss(*inputs)
        else:
            loss = losses.SigLipLoss(**_options(self, "rank", "world_size", "dist_impl"))(*inputs)
        return {"contrastive_loss": loss} if output_dict else loss


class InfoNCELoss(nn.Module):
    """`cross_entropy(logit_scale * queries @ keys.T, arange(M))`.

    Reads label_smoothing, symmetric, normalize and reduction.
    """

    can_torch_compile: bool = True

    def forward(
        self,
        queries: Tensor,  # (M, D)
        keys: Tensor,  # (N, D), N >= M
        logit_scale: Tensor | float,
    ) -> Tensor:
        options = _options(self, "label_smoothing", "symmetric", "normalize", "reduction")
        return losses.info_nce(queries, keys, logit_scale, **options)


class SupConLoss(nn.Module):
    """Supervised contrastive loss (arXiv 2004.11362). Reads normalize and reduction."""

    can_torch_compile: bool = True

    def forward(
        self,
        features: Tensor,  # (N, D)
        labels: Tensor,  # (N)
        logit_scale: Tensor | float,
    ) -> Tensor:
        options = _options(self, "normalize", "reduction")
        return losses.supcon_loss(features, labels, logit_scale, **options)


class NTXentLoss(nn.Module):
    """SimCLR's loss of two views (arXiv 2002.05709). Reads normalize and reduction."""

    can_torch_compile: bool = True

    def forward(
        self,
        x1: Tensor,  # (N, D)
        x2: Tensor,  # (N, D)
        logit_scale: Tensor | float,
    ) -> Tensor:
        options = _options(self, "normalize", "reduction")
        return losses.nt_xent_loss(x1, x2, logit_scale, **options)
