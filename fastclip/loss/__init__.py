"""The public losses: open_clip's classes, and the functions beneath them.

`fastclip.distributed` has the losses of batches that are spread over processes.
"""

from .clip import clip_loss
from .info_nce import info_nce
from .nt_xent import nt_xent_loss
from .open_clip import ClipLoss, SigLipLoss
from .ranking import ranking_loss
from .siglip import siglip_loss
from .supcon import supcon_loss

__all__ = [
    "ClipLoss",
    "SigLipLoss",
    "clip_loss",
    "info_nce",
    "nt_xent_loss",
    "ranking_loss",
    "siglip_loss",
    "supcon_loss",
]
