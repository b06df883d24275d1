"""The registry of losses: everything that the benchmark must know about a loss is a field of it.

LOSSES are in every plan and on every page. FAMILY has a plan (`cases.family`) and a table of its
own. Functions of fastclip and classes of open_clip are given by name and imported when they are
called, because `bench.gpu` starts before fastclip is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Inputs
from .measure import truth, truth_of_lines
from .methods import dense, peers
from .methods.open_clip import distillation
from .methods.peers import Peer

if TYPE_CHECKING:
    from fastclip import LineStatistics


class Swept(NamedTuple):
    """A block of logits that fastclip computes in two sweeps: its rows and columns, and the passes
    of 2 m n D FLOP for it, forward alone and with the backward if no products are kept."""

    m: int
    n: int
    forward: float = 1.0
    both: float = 4.0
    keeps: bool = True  # has the memory budget


def _one_block(m: int, n: int, device: str) -> list[Swept]:
    return [Swept(m, n)]


def _within(n: int, device: str) -> list[Swept]:
    """The blocks of N rows against themselves (`fastclip.formulas.nt_xent`)."""
    from fastclip.formulas.nt_xent import HALVED

    if n not in HALVED or device != "cpu":
        return [Swept(n, n, both=3.0, keeps=False)]
    across = Swept(n // 2, n - n // 2, keeps=False)
    return [across, *_within(across.m, device), *_within(across.n, device)]


def _of_views(m: int, n: int, device: str) -> list[Swept]:
    within = [*_within(m, device), *_within(n, device)]
    return [Swept(m, n, keeps=len(within) == 2), *within]  # beside halves nothing is kept


_NONE: Mapping[str, Any] = MappingProxyType({})


class Rival(NamedTuple):
    """open_clip's loss class across processes, the baseline of `bench.distributed`."""

    label: str  # in tables
    options: dict[str, Any]  # besides rank and world_size


def _all_four(inputs: Inputs) -> tuple[Any, ...]:
    return inputs.x, inputs.y, inputs.scale, inputs.bias


def _nothing_further(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return ()


class Loss(NamedTuple):
    """One loss of the benchmark. Its functions (fastclip's, dense, checkpointed, truth, those of
    open_clip and of peers) take the same arguments; see `call`."""

    label: str  # in tables
    function: str  # of fastclip.loss, fastclip.reference and fastclip.distributed
    dense: Callable[..., Tensor]
    truth: Callable[..., truth.Truth]
    options: Mapping[str, Any] = _NONE  # of `function`
    # The positional arguments of the functions, from the inputs of a case.
    arguments: Callable[[Inputs], tuple[Any, ...]] = _all_four
    # Makes the inputs beside features, scale and bias, for N columns of D features.
    further: Callable[[int, int, torch.Generator], tuple[Tensor, ...]] = _nothing_further
    named: tuple[str, ...] = ()  # the names of further inputs that are keyword arguments
    one_side: bool = False  # True if features are contrasted with themselves: there is no y
    scaled: bool = True  # False if similarities have no scale: the scale of a case is not used
    bias: float | None = None  # the initial bias of training, if the loss has one
    checkpointed: Callable[..., Tensor] | None = None
    kind: str = "softmax"  # of fastclip.kinds
    # The loss, written on `fastclip.contrast`, if it is not so itself.
    on_lines: Callable[[LineStatistics], Tensor] | None = None
    module: str | None = None  # of open_clip.loss
    of_open_clip: Callable[[Any], Callable[..., Any]] = lambda loss: loss  # from the module
    # How many logit matrices open_clip and the checkpointed loss compute: 2 if one per direction.
    directions: int = 1
    # open_clip's losses across processes, by method; the first is the baseline of all methods.
    rivals: Mapping[str, Rival] = _NONE
    peers: Mapping[str, Peer] = _NONE  # by library of peers.LIBRARIES
    # Weights need no state: one sweep computes the loss and its gradients, and keeps no products.
    in_one_go: bool = False
    rectangular: bool = False  # True if rectangular.py implements it
    # Passes of 2 M N D FLOP of the dense loss, forward alone and with the backward.
    dense_passes: tuple[float, float] = (1, 3)
    # The blocks of fastclip's loss of M rows and N columns on a device.
    swept: Callable[[int, int, str], list[Swept]] = _one_block
    floor: float = 2.0  # of FAMILY: the goal, how many times as fast as the dense loss

    def call(self, function: Callable[..., Any], inputs: Inputs) -> Any:
        """Calls one of the loss's functions with the inputs of a case."""
        keywords = dict(zip(self.named, inputs.further, strict=False))
        return function(*self.arguments(inputs), **keywords)

    def of_fastclip(self, module: str = "loss") -> Callable[..., Tensor]:
        """The function of fastclip.loss, fastclip.reference or fastclip.distributed."""
        function = getattr(importlib.import_module(f"fastclip.{module}"), self.function)
        return partial(function, **self.options) if self.options else function

    def bias_on(self, device: str) -> Tensor | None:
        return None if self.bias is None else torch.tensor(self.bias, device=device)


def _clip_on_lines(c: LineStatistics) -> Tensor:
    return (F.softplus(c.rows - c.positives) + F.softplus(c.columns - c.positives)).mean() / 2


def _siglip_on_lines(c: LineStatistics) -> Tensor:
    return (F.softplus(-c.positives) + (c.rows + c.columns) / 2).mean()


LOSSES: dict[str, Loss] = {
    "clip": Loss(
        "CLIP", "clip_loss", dense.dense_clip, truth.clip,
        checkpointed=dense.checkpointed_clip, on_lines=_clip_on_lines,
        module="ClipLoss", directions=2,
        rivals={
            "open_clip": Rival(
                "open_clip, local loss", {"local_loss": True, "gather_with_grad": True}
            )
        },
        peers={
            "inf_cl": Peer(peers.inf_cl, 2, 10),
            "liger": Peer(peers.liger, 2, 6),
            "memeff": Peer(peers.memeff, 1, 5),
        },
        rectangular=True,
    ),
    "siglip": Loss(
        "SigLIP", "siglip_loss", dense.dense_siglip, truth.siglip,
        bias=-10.0, checkpointed=dense.checkpointed_siglip,
        kind="sigmoid", on_lines=_siglip_on_lines, module="SigLipLoss",
        rivals={
            "open_clip": Rival("open_clip, bidir", {"dist_impl": "bidir"}),  # its default
            "open_clip gather": Rival("open_clip gather", {"dist_impl": "gather"}),
        },
        peers={"siglip_kernel": Peer(peers.siglip_kernel, 3, 3)},
        in_one_go=True,
    ),
}  # fmt: skip


def _pair_and_scale(inputs: Inputs) -> tuple[Any, ...]:
    return inputs.x, inputs.y, inputs.scale


def _captions(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A caption's number for each pair: a quarter of the captions are in the batch twice or more,
    and more than half of the pairs have such a caption."""
    return (torch.randint(n, (n,), generator=generator, device=generator.device),)


def _labels(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The class of each row; a class has eight rows on average."""
    return (torch.randint(max(1, n // 8), (n,), generator=generator, device=generator.device),)


def _teacher(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Normalised features of a teacher, of the student's width, and the scale of a trained one."""
    features = torch.randn(2, n, d, generator=generator, device=generator.device)
    return *F.normalize(features, dim=2).unbind(), torch.tensor(100.0, device=generator.device)


FAMILY: dict[str, Loss] = {
    "info_nce": Loss(
        "InfoNCE", "info_nce", dense.dense_info_nce, truth_of_lines.info_nce,
        arguments=_pair_and_scale,
        peers={"sentence_transformers": Peer(peers.multiple_negatives, 1, 3)},
    ),
    "clip_ids": Loss(
        "CLIP, duplicates ignored", "clip_loss", dense.dense_clip_ids, truth_of_lines.clip_ids,
        further=_captions, named=("ids",),
    ),
    "supcon": Loss(
        "SupCon", "supcon_loss", dense.dense_supcon, truth_of_lines.supcon,
        arguments=lambda i: (i.x, *i.further, i.scale), further=_labels, one_side=True,
        swept=lambda m, n, device: [Swept(m, n, both=3)],
        peers={"metric_learning": Peer(peers.metric_learning_supcon, 1, 3)},
    ),
    "ranking": Loss(
        "ranking, sum", "ranking_loss", dense.dense_ranking, truth_of_lines.ranking,
        arguments=lambda i: (i.x, i.y), scaled=False,
    ),
    "ranking_hardest": Loss(
        "ranking, hardest", "ranking_loss", dense.dense_ranking_hardest,
        truth_of_lines.ranking_hardest, options={"hardest": True},
        arguments=lambda i: (i.x, i.y), scaled=False,
        swept=lambda m, n, device: [Swept(m, n, both=1, keeps=False)],
    ),
    "nt_xent": Loss(
        "NT-Xent, 2N views", "nt_xent_loss", dense.dense_nt_xent, truth_of_lines.nt_xent,
        arguments=_pair_and_scale,
        peers={
            "lightly": Peer(peers.lightly, 4, 12, normalises=True),
            # It multiplies every positive with every negative: 275 GB at N = 2048.
            "metric_learning": Peer(peers.metric_learning_nt_xent, 4, 12, most=256),
        },
        dense_passes=(4, 12), swept=_of_views,
    ),
    "distill": Loss(
        "distillation", "distill_loss", dense.dense_distill, truth_of_lines.distill,
        arguments=lambda i: (i.x, i.y, i.scale, *i.further), further=_teacher,
        module="DistillClipLoss", of_open_clip=distillation, directions=2,
        dense_passes=(2, 4), swept=lambda m, n, device: [Swept(m, n, 2, 6)], floor=1.8,
    ),
}  # fmt: skip


def loss_of(name: str) -> Loss:
    """The registry's entry. Raises ValueError for an unknown name."""
    known = {**LOSSES, **FAMILY}
    if name not in known:
        raise ValueError(f"loss must be one of {', '.join(map(repr, known))}, got {name!r}")
    return known[name]
