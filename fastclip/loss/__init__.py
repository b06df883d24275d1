"""The public losses: open_clip's classes, and the functions beneath them.

`fastclip.distributed` has the losses of batches that are spread over processes.
"""

from .clip import clip_loss
from .open_clip import ClipLoss, SigLipLoss
from .siglip import siglip_loss

__all__ = ["ClipLoss", "SigLipLoss", "clip_loss", "siglip_loss"]
