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

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ..host import disabled
from ..replacements import Replacements
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
_CLASSES = tuple(name for name in __all__ if name.endswith("Loss"))
_made = Replacements()


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    HOST.load()
    return getattr(importlib.import_module(f"{__name__}.losses"), name)


def patch() -> None:
    """Puts fastclip's classes in the place of the host's, in each of its modules that has them.

    The host's classes that inherit from these, such as `SparseMultipleNegativesRankingLoss`,
    inherit from fastclip's. Objects that exist, and names that other modules have imported, stay
    as they are. A second call, and any call with FASTCLIP_DISABLE=1, does nothing.

    Raises:
        ImportError: sentence-transformers is not installed, or its version is not known.
    """
    if _made or disabled():
        return
    HOST.load()
    ours = {cls.__bases__[0]: cls for cls in (__getattr__(name) for name in _CLASSES)}
    modules = [module for name, module in sys.modules.items() if _of_host(name)]
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and value in ours:
                _made.replace(module, name, ours[value])
    for theirs, cls in ours.items():
        for heir in theirs.__subclasses__():
            if _of_host(heir.__module__):
                _made.replace(heir, "__bases__", (cls,))


def unpatch() -> None:
    """Puts the host's classes back. Without a patch it does nothing."""
    _made.restore()


def _of_host(module: str) -> bool:
    return f"{module}.".startswith(f"{HOST.package}.")
