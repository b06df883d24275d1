"""Losses of `fastclip.loss`, `contrast`, and metrics of `fastclip.retrieval`, for a batch that
is spread over processes.

After DDP's mean over ranks, the gradients of towers, scale and bias equal those of one process on
the concatenated batch. `fastclip.loss.ClipLoss` and `SigLipLoss` with `world_size > 1` use these.

The four combinations of open_clip's two options give the values and gradients that open_clip gives
(b pairs a rank, R ranks; effective: after DDP's mean; measured with open_clip 3.3.0):

    local_loss  gather_with_grad  value returned     effective gradient of the towers
    False       False             of all pairs       1/R of the exact one
    False       True              of all pairs       exact
    True        False             of own rows        not exact, even in direction
    True        True              of own rows        exact

Each rank computes one block of logits (b, R b), and only a tile of it exists at a time.

A process without an initialised group is a world of one: R = 1, and nothing is exchanged.

`torch.compile(fullgraph=True)` compiles the losses and `contrast` once for all batch sizes. The
graph holds them whole, the agreement of the ranks and the exchanges included. `uneven` batches and
`gather_features` break the graph, which is an error with `fullgraph`. A loss must run in the group
that it was compiled in. Ranks exchange in the order of their graphs, so all ranks need the same
graph if it has several losses. If SigLIP's texts are frozen on all ranks, a compiled loss holds
`4 B D` bytes on each rank that an eager one does not.
"""

from .contrast import contrast
from .family import distill_loss, info_nce, nt_xent_loss, ranking_loss, supcon_loss
from .gather_features import gather_features
from .losses import clip_loss, siglip_loss
from .retrieval import metrics, ranks

__all__ = [
    "clip_loss",
    "contrast",
    "distill_loss",
    "gather_features",
    "info_nce",
    "metrics",
    "nt_xent_loss",
    "ranking_loss",
    "ranks",
    "siglip_loss",
    "supcon_loss",
]
