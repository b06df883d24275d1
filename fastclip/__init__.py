"""fastclip: contrastive losses that never build the similarity matrix.

    from fastclip.loss import ClipLoss, SigLipLoss    # open_clip's classes, same signatures
    from fastclip.loss import clip_loss, siglip_loss  # the functions beneath them
    from fastclip.loss import info_nce, supcon_loss   # and the other losses of the field

    from fastclip import contrast                     # statistics to write your own loss with
    from fastclip import distributed                  # batches that are spread over processes
    from fastclip import cached_step                  # batches that the towers cannot hold at once
    from fastclip import retrieval                    # ranks, recall, the k best keys

`fastclip.backends()` lists the engines and the reason why each of the others cannot run here.
`fastclip.reference` has the same losses, dense and obvious.
"""

from . import distributed, reference, retrieval
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
    "distributed",
    "reference",
    "release_workspace",
    "retrieval",
    "siglip_loss",
]
