"""lightly's NTXentLoss and DCLLoss, without their 2N x 2N matrices.

    from fastclip.integrations.lightly import NTXentLoss

or `fastclip.integrations.lightly.patch()` before a script imports its losses, `DCLWLoss` included.
The classes are subclasses of the host's, with its arguments, and return its values and gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..subclasses import Subclasses
from .host import HOST

if TYPE_CHECKING:
    from .losses import DCLLoss, NTXentLoss

__all__ = ["HOST", "DCLLoss", "NTXentLoss", "patch", "unpatch"]

_subclasses = Subclasses(HOST, "lightly.loss", f"{__name__}.losses", ("DCLLoss", "NTXentLoss"))
__getattr__, patch, unpatch = _subclasses.get, _subclasses.patch, _subclasses.unpatch
