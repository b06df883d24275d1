"""The losses, dense and obvious: plain PyTorch to read, and to compare the fused ones with.

Each builds the full matrix of logits and lets autograd keep what it needs, so memory grows with
N^2. They have the signatures of the fused losses (without `live`), run on any device in any
floating dtype, and can be differentiated any number of times.

    fastclip.reference.clip_loss       fastclip.clip_loss
    fastclip.reference.siglip_loss     fastclip.siglip_loss
    fastclip.reference.info_nce        fastclip.loss.info_nce
    fastclip.reference.supcon_loss     fastclip.loss.supcon_loss
    fastclip.reference.nt_xent_loss    fastclip.loss.nt_xent_loss
    fastclip.reference.ranking_loss    fastclip.loss.ranking_loss
    fastclip.reference.distill_loss    fastclip.loss.distill_loss
    fastclip.reference.contrast        fastclip.contrast
    fastclip.reference.ranks           fastclip.retrieval.ranks
    fastclip.reference.topk            fastclip.retrieval.topk

With `backend="reference"` the fused losses are dense, too, and check their arguments; these do not.
"""

from .engine.dense_statistics import dense_contrast as contrast
from .loss.clip import dense_clip_loss as clip_loss
from .loss.distill import dense_distill_loss as distill_loss
from .loss.info_nce import dense_info_nce as info_nce
from .loss.nt_xent import dense_nt_xent_loss as nt_xent_loss
from .loss.ranking import dense_ranking_loss as ranking_loss
from .loss.siglip import dense_siglip_loss as siglip_loss
from .loss.supcon import dense_supcon_loss as supcon_loss
from .retrieval.dense import dense_ranks as ranks
from .retrieval.dense import dense_topk as topk

__all__ = [
    "clip_loss",
    "contrast",
    "distill_loss",
    "info_nce",
    "nt_xent_loss",
    "ranking_loss",
    "ranks",
    "siglip_loss",
    "supcon_loss",
    "topk",
]
