"""CLIP and SigLIP losses, and the statistics of `fastclip.contrast`, of a batch that is spread over
processes.

After DDP's mean over ranks the gradients of towers, scale and bias are those of one process on the
concatenated batch. `fastclip.loss.ClipLoss` and `SigLipLoss` with `world_size > 1` come here.

open_clip's four combinations, with its own gradients (b pairs a rank, R ranks; effective: after
DDP's mean; measured with open_clip 3.3.0):

    local_loss  gather_with_grad  value returned     effective gradient of the towers
    False       False             of all pairs       1/R of the exact one
    False       True              of all pairs       exact
    True        False             of own rows        incomplete, off in direction, too
    True        True              of own rows        exact

Here all four make one block of logits a rank, (b, R b), of which no more than a tile exists.

A process without an initialised group is a world of one: R = 1, nothing is exchanged.

`torch.compile(fullgraph=True)` takes the losses and `contrast` whole, agreement and exchanges
included, once for all batch sizes. `uneven` batches cut the graph, and so does `gather_features`:
with `fullgraph` they are an error. A loss runs in the group that it was compiled in.
Ranks exchange in the order of their graphs: several losses in one graph need one graph on all
ranks. Where SigLIP's texts are frozen on all ranks a compiled rank holds `4 B D` bytes that an
eager one does not.
"""

from .contrast import contrast
from .gather_features import gather_features
from .losses import clip_loss, siglip_loss

__all__ = ["clip_loss", "contrast", "gather_features", "siglip_loss"]
