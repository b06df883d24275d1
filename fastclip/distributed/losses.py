"""CLIP's and SigLIP's loss of a batch that is spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.compile_marks import no_compile
from ..formulas.info_nce import InfoNCE, clip
from ..formulas.needs_lines import check_no_live, needs_lines
from ..formulas.reduction import Reduction
from ..formulas.siglip import siglip
from .agreement import announced
from .calls import LossCall, begin_loss
from .compiled.call import takes_loss, traced_loss
from .described import described
from .gradient_mode import GradientMode
from .sharded_loss import sharded_loss
from .world import world_of_ranks

# The options of calls that need no line statistics.
_PLAIN_CLIP = described(
    "clip_loss", ids=None, same_id="ignore", label_smoothing=0, weights=None, reduction="mean"
)
_PLAIN_SIGLIP = described("siglip_loss", ids=None, same_id="ignore", weights=None, reduction="mean")


def clip_loss(
    image_features: Tensor,  # (b, D)
    text_features: Tensor,  # (b, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    ids: tuple[Tensor, Tensor] | Tensor | None = None,
    same_id: str = "ignore",
    label_smoothing: float = 0,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
    live: tuple[int, int] | None = None,
) -> Tensor:
    """Returns this rank's share of `fastclip.clip_loss` of all ranks' pairs. Equivalent to:

        images, texts = all_gather(image_features), all_gather(text_features)  # differentiable
        labels = start + torch.arange(b)
        loss = (F.cross_entropy(logit_scale * image_features @ texts.T, labels)
                + F.cross_entropy(logit_scale * text_features @ images.T, labels)) / 2

    (Radford et al., arXiv 2103.00020; open_clip's `local_loss=True, gather_with_grad=True`.) The
    mean of the ranks' values is the loss of the whole batch. Without `weights` all pairs weigh the
    same, so with `uneven` batches a rank's value is R / B times the sum over its pairs.

    Args:
        image_features, text_features: (b, D), this rank's pairs, as in `fastclip.clip_loss`.
        logit_scale, logit_bias: the same on all ranks. If they differ, the logits of a row have
            those of the row's rank, and every rank warns once, if it can compare them without
            waiting for a device.
        ids, same_id, label_smoothing, weights: as in `fastclip.clip_loss`, ids and weights of this
            rank's pairs; ids are compared across ranks. Weights have no gradient with the
            reduction "mean".
        reduction: "mean", "sum" (the mean over ranks is the sum over all pairs) or "none", the
            losses of this rank's pairs. With a reduction other than "mean", or with ids,
            label_smoothing or weights, the loss is computed through `contrast`, whose bytes then
            apply.
        process_group: the ranks that share the batch; None: all processes.
        ring: True sends texts around a ring, both ways at once, instead of gathering them. A rank
            then holds at most four ranks' texts, O(b D) instead of O(B D). Texts travel twice: in
            the forward and in the backward.
        uneven: batches may differ in size from rank to rank. A rank without pairs takes part and
            gets 0. Sizes are exchanged at every step, which waits for the device on GPUs.
        live: (start, stop) of this rank's pairs, as in `fastclip.clip_loss`; the same on all ranks
            unless `uneven`; None on a rank without pairs.
        normalize, backend, memory_budget: as in `fastclip.clip_loss`.

    Bytes that a rank sends (R ranks, b pairs a rank, B in all, E bytes a feature element):

                              gathered             ring
        texts                 (R - 1) b D E        2 (R - 1) b D E, for forward and backward
        gradients in fp32     4 (R - 1) b D        4 (R - 1) b D
        states                at most 40 * B       at most 40 * B

    With uneven batches b is a rank's own number of pairs; gradients are those of the others' texts,
    4 (B - b) D. On GPUs uneven batches are gathered as if each had the size of the largest one.

    Bytes that a rank holds beyond its inputs, at most:

                              gathered             ring
        texts and gradients   B D (E + 4), on      b D (4 E + 24)
                              CPUs B D (E + 8)
        own gradients         b D (2 E + 8)        b D (2 E + 8)
        states                100 * B              100 * B

    and the engine's work space and `memory_budget`. On GPUs uneven texts are held twice while they
    are gathered.

    Raises, on every rank:
        TypeError, ValueError: as `fastclip.clip_loss`, and ValueError if the ranks' widths, dtypes,
            options or (unless `uneven`) sizes differ, with ranks and sizes. Every call compares
            them through CPU memory. A group that only moves GPU tensors (NCCL without gloo)
            compares at the first call of each kind, and one rank's own error does not reach the
            others there: they wait until the group's timeout.
        RuntimeError: a rank has died; raised within the group's timeout, by gloo or NCCL.
    """
    options = {"ids": ids, "same_id": same_id, "label_smoothing": label_smoothing}
    if needs_lines(ids, label_smoothing, weights, same_id, reduction):
        announced(process_group, lambda: check_no_live(live))
        loss = described("clip_loss", **options, weights=weights, reduction=reduction)
        world = world_of_ranks(loss, process_group, ring, uneven, normalize, backend, memory_budget)
        return clip(
            world, image_features, text_features, logit_scale, logit_bias,
            InfoNCE(**options, symmetric=True), Reduction(reduction, weights),
        )  # fmt: skip
    return distributed_loss(
        "softmax", image_features, text_features, logit_scale, logit_bias, process_group,
        GradientMode(ring=ring), uneven, _PLAIN_CLIP, normalize, backend, memory_budget, live,
    )  # fmt: skip


def siglip_loss(
    image_features: Tensor,  # (b, D)
    text_features: Tensor,  # (b, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    ids: tuple[Tensor, Tensor] | Tensor | None = None,
    same_id: str = "ignore",
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
    live: tuple[int, int] | None = None,
) -> Tensor:
    """Returns this rank's share of `fastclip.siglip_loss` of all ranks' pairs. Equivalent to:

        texts = all_gather(text_features)  # differentiable
        logits = logit_scale * image_features @ texts.T + logit_bias
        labels = -torch.ones_like(logits)
        labels[range(b), start + torch.arange(b)] = 1
        loss = -F.logsigmoid(labels * logits).sum() / b

    (Zhai et al., arXiv 2303.15343.) Args, Raises: as `clip_loss`. Bytes sent are the same. Bytes
    held are the same, and `4 B D` more if the forward makes the gradients (gathered texts, float32
    or on GPUs): the backward scales them into a second tensor.
    """
    if needs_lines(ids, 0, weights, same_id, reduction):
        announced(process_group, lambda: check_no_live(live))
        loss = described(
            "siglip_loss", ids=ids, same_id=same_id, weights=weights, reduction=reduction
        )
        world = world_of_ranks(loss, process_group, ring, uneven, normalize, backend, memory_budget)
        return siglip(
            world, image_features, text_features, logit_scale, logit_bias, ids, same_id,
            Reduction(reduction, weights),
        )  # fmt: skip
    return distributed_loss(
        "sigmoid", image_features, text_features, logit_scale, logit_bias, process_group,
        GradientMode(ring=ring), uneven, _PLAIN_SIGLIP, normalize, backend, memory_budget, live,
    )  # fmt: skip


def distributed_loss(
    kind: str, x: Tensor, y: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None, process_group: dist.ProcessGroup | None,
    mode: GradientMode, uneven: bool, loss: str, normalize: bool = False,
    backend: str | None = None, memory_budget: int | None = None,
    live: tuple[int, int] | None = None, world: tuple[str, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """The entry of every loss across ranks: checks, the agreement of the ranks, the loss.

    loss: its name with its options (`described`). world: a module's name, and the rank and world
    size that were passed to it.
    """
    inputs = x, y, logit_scale, logit_bias
    call = LossCall(kind, mode, uneven, normalize, backend, memory_budget, live, world, loss)
    if torch.compiler.is_compiling() and takes_loss(inputs, process_group, call):
        return traced_loss(inputs, process_group, call)
    return _eager_loss(inputs, process_group, call)


@no_compile
def _eager_loss(
    inputs: tuple[Any, ...], process_group: dist.ProcessGroup | None, call: LossCall
) -> Tensor:
    tensors, context = begin_loss(inputs, process_group, call)
    return sharded_loss(*tensors, *context)
