"""fastclip: CLIP and SigLIP losses that never build the similarity matrix.

    from fastclip.loss import ClipLoss, SigLipLoss    # open_clip's signatures, call by call
    from fastclip.loss import clip_loss, siglip_loss  # the functions beneath

`fastclip.backends()` tells which engines can run here, and why each other one cannot;
`fastclip.reference` holds the same losses, dense and obvious.
"""

from .backends import backends, build_info, release_workspace
from .loss import ClipLoss, SigLipLoss, clip_loss, siglip_loss

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "SigLipLoss",
    "backends",
    "build_info",
    "clip_loss",
    "release_workspace",
    "siglip_loss",
]
