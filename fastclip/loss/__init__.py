"""The public losses: drop-ins for the ones in open_clip, and the functions beneath them.

Of batches that are spread over processes: `fastclip.distributed`.
"""

from .losses import clip_loss, siglip_loss
from .open_clip import ClipLoss, SigLipLoss

__all__ = ["ClipLoss", "SigLipLoss", "clip_loss", "siglip_loss"]
