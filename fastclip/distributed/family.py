"""The other losses of `fastclip.loss`, of a batch that is spread over ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ..formulas.distill import distill
from ..formulas.info_nce import InfoNCE
from ..formulas.info_nce import info_nce as _info_nce
from ..formulas.nt_xent import nt_xent
from ..formulas.ranking import ranking
from ..formulas.reduction import Reduction
from ..formulas.supcon import supcon
from .described import described
from .world import world_of_ranks


def info_nce(
    queries: Tensor,  # (m, D)
    keys: Tensor,  # (n, D)
    logit_scale: Tensor | float,
    *,
    offset: int | None = 0,
    labels: Tensor | None = None,
    ids: tuple[Tensor, Tensor] | None = None,
    same_id: str = "ignore",
    false_negative_margin: Tensor | float | None = None,
    key_bias: Tensor | None = None,
    margin: float = 0,
    label_smoothing: float = 0,
    decoupled: bool = False,
    hardness: float = 0,
    weights: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = False,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Returns this rank's share of `fastclip.loss.info_nce` of all ranks' queries and keys.

    A rank has the queries' own keys: `offset` and `labels` count this rank's keys. The negatives
    are all ranks' keys. The mean over ranks of the values is the value of one process, and so are
    the gradients after DDP's mean. "none" returns the losses of this rank's queries.

    Args: as `fastclip.loss.info_nce`, and process_group, ring and uneven as in `clip_loss`. Options
    are the same on all ranks; `offset` and `false_negative_margin` only need to be given on all
    ranks or on none. `weights` have no gradient with the reduction "mean".

    Raises, on every rank: as `fastclip.loss.info_nce` and `clip_loss`.
    """
    options = InfoNCE(
        offset, labels, ids, same_id, false_negative_margin, key_bias, margin, label_smoothing,
        decoupled, hardness, symmetric,
    )  # fmt: skip
    # Offsets count a rank's own keys, and may differ; so may the margins of false negatives.
    may_differ = {"offset": offset, "false_negative_margin": false_negative_margin}
    given = {name: "None" if value is None else "given" for name, value in may_differ.items()}
    common = options._asdict() | given
    loss = described("info_nce", **common, weights=weights, reduction=reduction)
    world = world_of_ranks(loss, process_group, ring, uneven, normalize, backend, memory_budget)
    return _info_nce(world, queries, keys, logit_scale, options, Reduction(reduction, weights))


def supcon_loss(
    features: Tensor,  # (n, D)
    labels: Tensor,  # (n)
    logit_scale: Tensor | float,
    *,
    decoupled: bool = False,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Returns this rank's share of `fastclip.loss.supcon_loss` of all ranks' features. Labels are
    compared across ranks.

    Args, Raises: as there, and process_group, ring and uneven as in `clip_loss`. Beside the bytes
    that `contrast` sends, sums of features over labels take 16 * B * D in the forward and
    32 * B * D in the backward (B features in all).
    """
    loss = described("supcon_loss", decoupled=decoupled, weights=weights, reduction=reduction)
    world = world_of_ranks(loss, process_group, ring, uneven, normalize, backend, memory_budget)
    return supcon(world, features, labels, logit_scale, decoupled, Reduction(reduction, weights))


def nt_xent_loss(
    x1: Tensor,  # (n, D)
    x2: Tensor,  # (n, D)
    logit_scale: Tensor | float,
    *,
    decoupled: bool = False,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Returns this rank's share of `fastclip.loss.nt_xent_loss` of all ranks' samples.

    Args, Raises: as there, and process_group, ring and uneven as in `clip_loss`.
    """
    loss = described("nt_xent_loss", decoupled=decoupled, weights=weights, reduction=reduction)
    world = world_of_ranks(loss, process_group, ring, uneven, normalize, backend, memory_budget)
    return nt_xent(world, x1, x2, logit_scale, decoupled, Reduction(reduction, weights))


def ranking_loss(
    x: Tensor,  # (n, D)
    y: Tensor,  # (n, D)
    *,
    margin: float = 0.2,
    hardest: bool = False,
    symmetric: bool = True,
    ids: tuple[Tensor, Tensor] | Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Returns this rank's share of `fastclip.loss.ranking_loss` of all ranks' pairs.

    Args, Raises: as there, and process_group, ring and uneven as in `clip_loss`. With `hardest`
    both sides' features are gathered, also with `ring`.
    """
    loss = described(
        "ranking_loss", margin=margin, hardest=hardest, symmetric=symmetric, ids=ids,
        weights=weights, reduction=reduction,
    )  # fmt: skip
    world = world_of_ranks(loss, process_group, ring, uneven, normalize, backend, memory_budget)
    return ranking(
        world, x, y, margin, hardest, symmetric, ids, normalize, Reduction(reduction, weights)
    )


def distill_loss(
    x: Tensor,  # (m, D)
    y: Tensor,  # (n, D)
    logit_scale: Tensor | float,
    teacher_x: Tensor,  # (m, D')
    teacher_y: Tensor,  # (n, D')
    teacher_scale: Tensor | float,
    *,
    symmetric: bool = True,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    ring: bool = False,
    uneven: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Returns this rank's share of `fastclip.loss.distill_loss` of all ranks' features.

    Args, Raises: as there (m == n if symmetric), and process_group, ring and uneven as in
    `clip_loss`. The teacher's columns are gathered, also with `ring`.
    """
    loss = described("distill_loss", symmetric=symmetric, weights=weights, reduction=reduction)
    world = world_of_ranks(loss, process_group, ring, uneven, normalize, backend, memory_budget)
    return distill(
        world, x, y, logit_scale, teacher_x, teacher_y, teacher_scale, symmetric,
        Reduction(reduction, weights),
    )  # fmt: skip
