"""open_clip's loss classes (3.3.0) with the same signatures, without the N x N matrices.

They take what open_clip's models return: normalised features and an exponentiated `logit_scale`.
With a world size above 1 they compute the losses of `fastclip.distributed`.
"""

from .clip import ClipLoss
from .coca import CoCaLoss
from .distill import DistillClipLoss
from .siglip import SigLipLoss

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss"]
