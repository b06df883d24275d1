"""fastclip: CLIP and SigLIP losses that never build the similarity matrix.

    from fastclip.loss import ClipLoss, SigLipLoss    # open_clip's signatures, call by call
    from fastclip.loss import clip_loss, siglip_loss  # the functions beneath

    from fastclip import contrast                     # statistics to write a loss of one's own on
    from fastclip import distributed, cached_step     # batches over processes; beyond memory

`fastclip.backends()` tells which engines can run here, and why each other one cannot;
`fastclip.reference` holds the same losses, dense and obvious.
"""

from .cached import cached_step
from .contrast import contrast
from .engine.backends import backends, build_info, release_workspace
from .kinds import LineStatistics
from .loss import ClipLoss, SigLipLoss, clip_loss, siglip_loss

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "LineStatistics",
    "SigLipLoss",
    "backends",
    "build_info",
    "cached_step",
    "clip_loss",
    "contrast",
    "release_workspace",
    "siglip_loss",
]
