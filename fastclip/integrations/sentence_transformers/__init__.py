"""sentence-transformers' ranking and GIST losses, without their N x N matrices.

    from fastclip.integrations.sentence_transformers import MultipleNegativesRankingLoss
    loss = MultipleNegativesRankingLoss(model)

or, with scripts unchanged,

    from fastclip.integrations import sentence_transformers
    sentence_transformers.patch()  # before the script imports its losses

The classes are subclasses of the host's, with its arguments, and return its values and gradients.
sentence-transformers is imported when a class is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..subclasses import Subclasses
from .calls import HOST

if TYPE_CHECKING:
    from .losses import (
        CachedGISTEmbedLoss,
        CachedMultipleNegativesRankingLoss,
        GISTEmbedLoss,
        MultipleNegativesRankingLoss,
    )

__all__ = [
    "HOST",
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "GISTEmbedLoss",
    "MultipleNegativesRankingLoss",
    "patch",
    "unpatch",
]
_subclasses = Subclasses(
    HOST, "sentence_transformers.sentence_transformer.losses", f"{__name__}.losses",
    tuple(name for name in __all__ if name.endswith("Loss")),
)  # fmt: skip
__getattr__, patch, unpatch = _subclasses.get, _subclasses.patch, _subclasses.unpatch
