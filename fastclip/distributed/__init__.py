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

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..engine.checks import check_features
from ..engine.no_compile import no_compile
from ..kinds import LineStatistics
from . import traced
from .agreement import agree, check_world, refuse
from .block_row import GradientMode
from .calls import ContrastCall, LossCall, begin_contrast, begin_loss
from .shard import Shard
from .sharded_loss import sharded_loss
from .sharded_statistics import sharded_statistics


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
    if torch.compiler.is_compiling() and traced.takes_loss(inputs, process_group, call):
        return traced.loss(inputs, process_group, call)
    return _eager_loss(inputs, process_group, call)


@no_compile
def _eager_loss(
    inputs: tuple[Any, ...], process_group: dist.ProcessGroup | None, call: LossCall
) -> Tensor:
    tensors, context = begin_loss(inputs, process_group, call)
    return sharded_loss(*tensors, *context)


def contrast(
    x: Tensor,  # (m, D)
    y: Tensor,  # (n, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    offset: int | None = 0,
    ids: tuple[Tensor, Tensor] | None = None,
    same_id: str = "ignore",
    false_negative_margin: Tensor | float | None = None,
    key_bias: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
    kind: str = "softmax",
    normalize: bool = False,
    process_group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> LineStatistics:
    """`fastclip.contrast` of the rows and the columns of all ranks: of its statistics those of this
    rank's lines.

        c = contrast(x, y, logit_scale)
        loss = (F.softplus(c.rows - c.positives) + F.softplus(c.columns - c.positives)).mean() / 2

    is `clip_loss` here, of even batches. A loss of one's own is this rank's share of the whole, so
    that the mean over ranks is meant: R / B times the sum over this rank's lines where batches
    differ in size. After DDP's mean over ranks the gradients of towers, scale, biases are those of
    one process that takes the mean of the ranks' losses.

    Args:
        x, y: (m, D), (n, D), this rank's rows and columns; m and n need not be equal.
        offset: row i's own positive is this rank's column i + offset, where it has one; None: no
            row has one, on any rank.
        ids: (x_ids (m), y_ids (n)) of this rank's lines; compared across ranks.
        false_negative_margin: each rank's own positives and margin say what its lines leave out.
        key_bias: (n), of this rank's columns. Its gradient is the sum over all ranks.
        process_group, ring, uneven: as in `clip_loss`. Sizes m and n are exchanged; with `uneven` a
            rank may have no rows, no columns, or neither.
        logit_scale, logit_bias, same_id, rows, columns, kind, normalize: the same on all ranks;
            these, backend and memory_budget as in `fastclip.contrast`.

    Every rank must go backward through something that it got, a rank without pairs too, since the
    others' gradients wait for it: `c.rows.sum()` of no rows is enough.

    Bytes that a rank sends, E per feature element, B columns of all ranks: `(R - 1) n D E` for the
    features, `4 (R - 1) n D` for their gradients in fp32, around the ring features twice, as in
    `clip_loss`. Beside them at most 56 B for states and coefficients; 40 B more with
    `same_id="positive"`, 8 B for ids, 4 B for a margin, 16 B for key_bias.

    Bytes that a rank holds: as in `clip_loss`; where some of its rows alone have their positive
    among its columns, `4 B D` more while gathered gradients are put together.

    Raises, on every rank: what `fastclip.contrast` does; ValueError and RuntimeError as in
        `clip_loss`.
    """
    given = (x, y, logit_scale, logit_bias, key_bias, ids, false_negative_margin)
    call = ContrastCall(
        offset, same_id, rows, columns, kind, normalize, ring, uneven, backend, memory_budget
    )
    if torch.compiler.is_compiling() and traced.takes_contrast(given, process_group, call):
        return traced.contrast(given, process_group, call)
    return _eager_contrast(given, process_group, call)


@no_compile
def _eager_contrast(
    given: tuple[Any, ...], process_group: dist.ProcessGroup | None, call: ContrastCall
) -> LineStatistics:
    return sharded_statistics(*begin_contrast(given, process_group, call))


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


@no_compile
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
