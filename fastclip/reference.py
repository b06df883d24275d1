"""The losses, dense and obvious: plain PyTorch to read, and to compare the fused ones with.

Each builds the full matrix of logits and lets autograd keep what it needs, so memory grows with
N^2. They have the signatures of the fused losses (without `live`), run on any device in any
floating dtype, and can be differentiated any number of times.

    fastclip.reference.clip_loss     fastclip.clip_loss
    fastclip.reference.siglip_loss   fastclip.siglip_loss
    fastclip.reference.contrast      fastclip.contrast

`backend="reference"` of a fused loss runs these.
"""

from .engine.dense_statistics import dense_contrast as contrast
from .loss.clip import dense_clip_loss as clip_loss
from .loss.siglip import dense_siglip_loss as siglip_loss

__all__ = ["clip_loss", "contrast", "siglip_loss"]
