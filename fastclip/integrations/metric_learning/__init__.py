"""pytorch-metric-learning's NTXentLoss and SupConLoss, without their N x N matrices.

    from fastclip.integrations.metric_learning import SupConLoss

or `fastclip.integrations.metric_learning.patch()` before a script imports its losses. The classes
are subclasses of the host's, with its arguments, reducers and regularizers included, and return its
values and gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..subclasses import Subclasses
from .host import HOST

if TYPE_CHECKING:
    from .losses import NTXentLoss, SupConLoss

__all__ = ["HOST", "NTXentLoss", "SupConLoss", "patch", "unpatch"]

_subclasses = Subclasses(
    HOST, "pytorch_metric_learning.losses", f"{__name__}.losses", ("NTXentLoss", "SupConLoss")
)
__getattr__, patch, unpatch = _subclasses.get, _subclasses.patch, _subclasses.unpatch
