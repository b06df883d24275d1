"""The host, and which calls of its losses fastclip serves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..host import Host, disabled

HOST = Host("sentence_transformers", ("6.0", "6.1", "6.2"))


def served(obstacle: str | None) -> bool:
    """True if fastclip computes the call. If an obstacle is given it does not, which it says once;
    neither does it with FASTCLIP_DISABLE=1."""
    if disabled():
        return False
    if obstacle is not None:
        HOST.falls_back(obstacle)
    return obstacle is None


def normalizes(similarity: Callable[..., Any]) -> bool | None:
    """True for the cosine similarity, False for the dot product, None for any other."""
    from sentence_transformers import util

    model = getattr(similarity, "__self__", None)
    if model is not None and getattr(similarity, "__name__", "") == "similarity":
        # `model.similarity`, a method that calls the function that the model names.
        return {"cosine": True, "dot": False}.get(getattr(model, "similarity_fn_name", None))
    known = {util.cos_sim: True, util.pytorch_cos_sim: True, util.dot_score: False}
    return known.get(similarity)


def gathers_alike(loss: type) -> bool:
    """True if the module of a host's loss has the host's functions for ranks, not a caller's."""
    from sentence_transformers import util

    module = sys.modules[loss.__module__]
    names = ("all_gather_with_grad", "get_rank")
    return all(getattr(module, name, None) is getattr(util, name) for name in names)


def obstacle_of(columns: Sequence[Sequence[Tensor]]) -> str | None:
    """Says why embeddings, each column of a batch or of a guide, cannot be contrasted; None if
    they can."""
    for embeddings in columns:
        for one in embeddings:
            if one.layout != torch.strided or one.ndim != 2:
                return (
                    f"embeddings must be dense matrices, got {one.layout} in {one.ndim} dimensions"
                )
        sizes = {len(one) for one in embeddings}
        if len(sizes) > 1:
            return f"the columns of a batch must have one size, got {sorted(sizes)}"
    return None
