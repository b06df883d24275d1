"""The public losses: functions, the same losses as modules, and open_clip's classes.

`fastclip.distributed` has the losses of batches that are spread over processes.
"""

from .clip import clip_loss
from .distill import distill_loss
from .global_clip import GlobalClipLoss
from .info_nce import info_nce
from .modules import InfoNCELoss, NTXentLoss, RankingLoss, SupConLoss
from .nt_xent import nt_xent_loss
from .open_clip import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from .ranking import ranking_loss
from .siglip import siglip_loss
from .supcon import supcon_loss

__all__ = [
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "GlobalClipLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "RankingLoss",
    "SigLipLoss",
    "SupConLoss",
    "clip_loss",
    "distill_loss",
    "info_nce",
    "nt_xent_loss",
    "ranking_loss",
    "siglip_loss",
    "supcon_loss",
]
