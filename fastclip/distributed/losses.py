"""CLIP's and SigLIP's loss of a batch that is spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.no_compile import no_compile
from .calls import LossCall, begin_loss
from .compiled.call import takes_loss, traced_loss
from .gradient_mode import GradientMode
from .sharded_loss import sharded_loss


def clip_loss(
    image_features: Tensor,  # (b, D)
    text_features: Tensor,  # (b, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    process_group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
    live: tuple[int, int] | None = None,
) -> Tensor:
    """This rank's share of `fastclip.clip_loss` on all ranks' pairs. Equivalent to:

        images, texts = all_gather(image_features), all_gather(text_features)  # differentiable
        labels = start + torch.arange(b)
        loss = (F.cross_entropy(logit_scale * image_features @ texts.T, labels)
                + F.cross_entropy(logit_scale * text_features @ images.T, labels)) / 2

    (Radford et al., arXiv 2103.00020; open_clip's `local_loss=True, gather_with_grad=True`.) The
    mean of the ranks' values is the loss of the whole batch; with `uneven` batches every pair
    counts alike, so a rank's value is R / B times the sum over its pairs.

    Args:
        image_features, text_features: (b, D), this rank's pairs, as in `fastclip.clip_loss`.
        logit_scale, logit_bias: the same on all ranks.
        process_group: the ranks that share the batch; None: all processes.
        ring: texts travel from rank to rank, both ways at once, and a rank holds four ranks' of
            them at most, O(b D), instead of all, O(B D): slower, for batches that do not fit.
        uneven: batches may differ in size from rank to rank, and a rank may have no pairs: it takes
            part, and its value is 0. Sizes are exchanged at every step, which on GPUs waits for the
            device.
        live: (start, stop), as in `fastclip.clip_loss`, of this rank's pairs; the same on all ranks
            unless `uneven`; None on a rank without pairs.
        normalize, backend, memory_budget: as in `fastclip.clip_loss`.

    Bytes that a rank sends, E per feature element: `(R - 1) b D E` for the texts, `4 (R - 1) b D`
    for their gradients in fp32, at most 40 B for states. Around the ring texts travel twice, for
    the forward and for the backward, and gradients follow: `(R - 1) b D (2 E + 4)`. Uneven batches
    are gathered as if all had the largest one's b.

    Bytes that a rank holds beside its inputs, at most: `B D (E + 4)` for all texts and their
    gradients, on CPUs `4 B D` more while these add up; around the ring `b D (4 E + 24)`. Either way
    `b D (2 E + 8)` for its own gradients, `100 B` for states, the engine's work space and
    `memory_budget`. Uneven texts are held twice while they are gathered.

    Raises, on every rank: what `fastclip.clip_loss` does; ValueError where the ranks' widths,
        dtypes, options or, unless `uneven`, sizes differ: it names ranks and sizes. In a group that
        moves GPU tensors alone (NCCL without gloo beside it) only the first call of each kind
        compares; elsewhere every call does, through CPU memory. RuntimeError where a rank has died:
        within the group's timeout, which is gloo's and NCCL's to keep.
    """
    return distributed_loss(
        "softmax", image_features, text_features, logit_scale, logit_bias, process_group,
        GradientMode(ring=ring), uneven, normalize, backend, memory_budget, live,
    )  # fmt: skip


def siglip_loss(
    image_features: Tensor,  # (b, D)
    text_features: Tensor,  # (b, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    process_group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
    live: tuple[int, int] | None = None,
) -> Tensor:
    """This rank's share of `fastclip.siglip_loss` on all ranks' pairs. Equivalent to:

        texts = all_gather(text_features)  # differentiable
        logits = logit_scale * image_features @ texts.T + logit_bias
        labels = -torch.ones_like(logits)
        labels[range(b), start + torch.arange(b)] = 1
        loss = -F.logsigmoid(labels * logits).sum() / b

    (Zhai et al., arXiv 2303.15343.) Args, Raises: as `clip_loss`; so are bytes, but that where the
    forward makes the gradients (all texts gathered, float32 or on GPUs) these wait for the backward
    and are there twice, `4 B D` more, when it scales them.
    """
    return distributed_loss(
        "sigmoid", image_features, text_features, logit_scale, logit_bias, process_group,
        GradientMode(ring=ring), uneven, normalize, backend, memory_budget, live,
    )  # fmt: skip


def distributed_loss(
    kind: str, x: Tensor, y: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None, process_group: dist.ProcessGroup | None,
    mode: GradientMode, uneven: bool, normalize: bool = False, backend: str | None = None,
    memory_budget: int | None = None, live: tuple[int, int] | None = None,
    world: tuple[str, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Every loss across processes calls this: checks, an agreement among ranks, the loss.

    world: of a module its name, and the rank and world size that it was told.
    """
    inputs = x, y, logit_scale, logit_bias
    call = LossCall(kind, mode, uneven, normalize, backend, memory_budget, live, world)
    if torch.compiler.is_compiling() and takes_loss(inputs, process_group, call):
        return traced_loss(inputs, process_group, call)
    return _eager_loss(inputs, process_group, call)


@no_compile
def _eager_loss(
    inputs: tuple[Any, ...], process_group: dist.ProcessGroup | None, call: LossCall
) -> Tensor:
    tensors, context = begin_loss(inputs, process_group, call)
    return sharded_loss(*tensors, *context)
