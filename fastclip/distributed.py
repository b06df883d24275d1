"""CLIP and SigLIP losses of a batch that is spread over processes.

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
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .agreement import agree, check_world, refuse
from .backends import choose
from .block_row import Sharing
from .function import Plan
from .inputs import budget_of, check_features, check_live, product_dtype, scalar
from .shard import Shard
from .sharded import sharded_loss
from .uncompiled import uncompiled

LOSSES = ("softmax", "sigmoid")


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
        uneven: batches may differ in size from rank to rank. Sizes are exchanged at every step,
            which on GPUs waits for the device.
        live: (start, stop), as in `fastclip.clip_loss`, of this rank's pairs; the same on all ranks
            unless `uneven`.
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
        compares; elsewhere every call does, through CPU memory. RuntimeError without an initialised
        process group, or where a rank has died: within the group's timeout, which is gloo's and
        NCCL's to keep.
    """
    return shared_loss(
        "softmax", image_features, text_features, logit_scale, logit_bias, process_group,
        Sharing(ring=ring), uneven, normalize, backend, memory_budget, live,
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
    return shared_loss(
        "sigmoid", image_features, text_features, logit_scale, logit_bias, process_group,
        Sharing(ring=ring), uneven, normalize, backend, memory_budget, live,
    )  # fmt: skip


@uncompiled
def shared_loss(
    loss: str, x: Tensor, y: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None, process_group: dist.ProcessGroup | None, sharing: Sharing,
    uneven: bool, normalize: bool = False, backend: str | None = None,
    memory_budget: int | None = None, live: tuple[int, int] | None = None,
    world: tuple[str, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """What every loss across processes calls: checks, an agreement among ranks, the loss.

    world: of a module its name, and the rank and world size that it was told.
    """
    alike = {
        "loss": LOSSES.index(loss), "normalize": int(normalize),
        **{name: int(value) for name, value in sharing._asdict().items()},
    }  # fmt: skip
    try:
        if world is not None:
            check_world(*world, process_group)
        check_features(x, y)
        live = check_live(live, x.shape[0])
        scale = scalar("logit_scale", logit_scale, x)
        bias = None if logit_bias is None else scalar("logit_bias", logit_bias, x)
        dtype = product_dtype(x, y)
        engine = choose(backend, x.device, dtype, x.shape[0], x.shape[1])
        if engine == "reference":
            raise ValueError("backend must be an engine, which the dense 'reference' is not")
        budget = budget_of(memory_budget, x.device)
    except (TypeError, ValueError):
        refuse(process_group)
        raise
    inputs = (x, y, scale, bias)
    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    # Autocast may be on for some ranks alone.
    alike["dtype of products"] = dtype
    shard = agree(process_group, x, y, wants, uneven, live, **alike)
    plan = Plan(loss, engine, dtype, normalize, "mean", budget)
    return sharded_loss(*inputs, plan, shard, sharing)


def _all_rows(x: Tensor, shard: Shard) -> Tensor:
    """All ranks' rows, in a tensor of their own: of one rank they would be x itself."""
    return shard.gather(x).clone() if shard.world_size == 1 else shard.gather(x)


class _Gather(torch.autograd.Function):
    """All ranks' rows; the gradient is the sum of what the ranks make of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return _all_rows(x, shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.scatter_sum(g), None


@uncompiled
def gather_features(
    image_features: Tensor,
    text_features: Tensor,
    local_loss: bool = False,
    gather_with_grad: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    use_horovod: bool = False,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """open_clip's function of that name: both towers' features of all ranks, (B, D).

    With `gather_with_grad` differentiable, once; else only own rows are, and not with
    `local_loss`. rank and world_size may be left out. For losses of one's own: those of this
    library never hold more than one tower's.
    """
    alike = {"local_loss": int(local_loss), "gather_with_grad": int(gather_with_grad)}
    try:
        if use_horovod:
            raise ValueError("use_horovod must be False, got True: use torch.distributed")
        if rank is not None and world_size is not None:
            check_world("gather_features", rank, world_size, process_group)
        check_features(image_features, text_features)
    except (TypeError, ValueError):
        refuse(process_group)
        raise
    towers = image_features, text_features
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in towers)
    shard = agree(process_group, *towers, wants, False, **alike)
    if gather_with_grad:
        needed = (shard.needs_x and wants, shard.needs_y and wants)
        # A tower that is frozen on this rank alone takes part in the others' gradients.
        towers = tuple(
            t if t.requires_grad or not needs else t.detach().requires_grad_()
            for t, needs in zip(towers, needed, strict=True)
        )
        images, texts = (_Gather.apply(t, shard) for t in towers)
        return images, texts
    gathered = [_all_rows(t.detach(), shard) for t in towers]
    if not local_loss:
        for every, own in zip(gathered, towers, strict=True):
            every[shard.mine] = own
    return gathered[0], gathered[1]
