"""open_clip's retrieval metrics, without its matrix of logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...retrieval import metrics
from ..host import Host

# The modules of the trainer that may define `get_clip_metrics`: open_clip 4.2's and 3.3's.
MODULES = ("open_clip_train.metrics", "open_clip_train.train")


def in_place_of(own: Callable[..., dict[str, Any]], host: Host) -> Callable[..., dict[str, Any]]:
    """Returns `fastclip.retrieval.metrics` for calls that were meant for open_clip's function."""

    @functools.wraps(own)
    def get_clip_metrics(
        image_features: Any, text_features: Any, *others: Any, **options: Any
    ) -> dict[str, Any]:
        if not (_is_finite(image_features) and _is_finite(text_features)):
            # A model that has diverged must not end the training.
            host.falls_back("retrieval metrics of features that are not finite")
            return own(image_features, text_features, *others, **options)
        return metrics(image_features, text_features, *others, **options)

    # Not of the module that defines open_clip's: patching again must not wrap this one.
    get_clip_metrics.__module__ = __name__
    return get_clip_metrics


def _is_finite(features: Any) -> bool:
    chunks = [features] if isinstance(features, Tensor) else features
    return all(bool(torch.isfinite(chunk).all()) for chunk in chunks)
