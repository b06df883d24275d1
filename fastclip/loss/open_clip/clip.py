"""open_clip's `ClipLoss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...distributed import gather_features
from ...distributed.agreement import check_world
from ...distributed.described import described
from ...distributed.gradient_mode import GradientMode
from ...distributed.local_negatives import warn_of_local_negatives
from ...distributed.losses import distributed_loss
from ...distributed.world import world_of_ranks
from ...engine.autograd import WeighedGradient
from ...engine.checks import check_features
from ...engine.compile_marks import constant_in_graphs
from ...engine.warn_once import warn_once
from ...formulas.info_nce import InfoNCE, clip
from ...formulas.needs_lines import check_no_live, needs_lines
from ...formulas.reduction import Reduction
from ..base import one_process
from ..clip import clip_loss
from ..holds_group import HoldsGroup
from .dense import backend_in_trace, open_clip_logits, overrides, refuse_live, refuse_options


def _warn_of_direction() -> None:
    warn_once(
        "the direction of gradients",
        "ClipLoss(local_loss=True, gather_with_grad=False) returns open_clip's gradient, which "
        "leaves out what other ranks' losses contribute: it is not the gradient of the loss, and "
        "even its direction is off; gather_with_grad=True is exact",
    )


# A graph cannot hold a warning.
@constant_in_graphs
def _warn_while_compiling() -> None:
    _warn_of_direction()


class ClipLoss(HoldsGroup):
    """open_clip's `ClipLoss`, without parameters or buffers.

    `get_logits` and `get_ground_truth` are dense, as in open_clip, for subclasses that call them.
    If a subclass overrides one of them, the loss is the dense loss of what it returns. It is dense
    in `torch.jit.trace`, too.

    Args:
        local_loss, gather_with_grad: which value and which gradients a rank gets; see the table in
            `fastclip.distributed`. True, True is exact; True, False warns once.
        cache_labels: keep the labels of `get_ground_truth`.
        rank, world_size: those of this process within `process_group`.
        use_horovod: must be False.
        process_group, ring, uneven: as in `fastclip.distributed.clip_loss`.
        same_id, label_smoothing, normalize, backend, memory_budget: as in `fastclip.clip_loss`.
        reduction: as in `fastclip.clip_loss`. "none" returns the losses of this rank's pairs, also
            with `local_loss=False`; with the default flags their gradients have open_clip's factor
            of 1 / world_size, as those of the mean have.

    Raises:
        ValueError: use_horovod=True; at a call, a rank or world size that is not the group's, or
            ids, weights, label_smoothing or a reduction other than "mean" with `local_loss=True,
            gather_with_grad=False`, and in a subclass that makes its own logits or labels.
        RuntimeError: at a call, a world_size above 1 without an initialised process group.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        process_group: dist.ProcessGroup | None = None,
        ring: bool = False,
        uneven: bool = False,
        same_id: str = "ignore",
        label_smoothing: float = 0,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("ClipLoss: use_horovod must be False, got True: use torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.process_group = process_group
        self.ring = ring
        self.uneven = uneven
        self.same_id = same_id
        self.label_smoothing = label_smoothing
        self.normalize = normalize
        self.reduction = reduction
        self.backend = backend
        self.memory_budget = memory_budget
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """(num_logits,) int64: the index of each row's positive."""
        labels = self.labels.get(device) if self.cache_labels else None
        if labels is None or len(labels) != num_logits:
            labels = torch.arange(num_logits, device=device, dtype=torch.long)
            if self.world_size > 1 and self.local_loss:
                labels += num_logits * self.rank
            if self.cache_labels:
                self.labels[device] = labels
                self.prev_num_logits = num_logits
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Dense logits per image and per text: (N, N); across processes (b, B), this rank's rows,
        with `local_loss`, and (B, B) without."""
        if self.world_size == 1:
            logits = open_clip_logits(image_features, text_features, logit_scale, logit_bias)
            return logits, logits.T
        images, texts = gather_features(
            image_features, text_features, local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad, rank=self.rank, world_size=self.world_size,
            process_group=self.process_group,
        )  # fmt: skip
        if not self.local_loss:
            logits = open_clip_logits(images, texts, logit_scale, logit_bias)
            return logits, logits.T
        return (
            open_clip_logits(image_features, texts, logit_scale, logit_bias),
            open_clip_logits(text_features, images, logit_scale, logit_bias),
        )

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        live: tuple[int, int] | None = None,
        ids: tuple[Tensor, Tensor] | Tensor | None = None,
        weights: Tensor | None = None,  # (N,)
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or `{"contrastive_loss": loss}`; live, ids and weights as in
        `fastclip.clip_loss`, across ranks as in `fastclip.distributed.clip_loss`."""
        inputs = (image_features, text_features, logit_scale, logit_bias)
        if self.world_size > 1 and self.local_loss and not self.gather_with_grad:
            if torch.compiler.is_compiling():
                _warn_while_compiling()
            else:
                _warn_of_direction()
        elif self.world_size == 1:
            warn_of_local_negatives(type(self).__name__, self.process_group)
        on_lines = needs_lines(ids, self.label_smoothing, weights, self.same_id, self.reduction)
        if overrides(self, ClipLoss):
            refuse_live(live)
            refuse_options(
                "a subclass that makes its own logits", ids=ids is not None,
                weights=weights is not None, label_smoothing=self.label_smoothing != 0,
                same_id=self.same_id != "ignore", normalize=self.normalize,
                reduction=self.reduction != "mean",
            )  # fmt: skip
            per_image, per_text = self.get_logits(*inputs)
            labels = self.get_ground_truth(image_features.device, per_image.shape[0])
            loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        elif self.world_size > 1 and on_lines:
            options = InfoNCE(
                ids=ids, same_id=self.same_id, label_smoothing=self.label_smoothing, symmetric=True
            )
            reduction = Reduction(self.reduction, weights)
            (loss,) = self._shares(
                "ClipLoss", image_features, text_features,
                lambda world, x, y: (
                    clip(world, x, y, logit_scale, logit_bias, options, reduction),
                ),
                lambda: self._check_exact(live), ids=ids, weights=weights,
            )  # fmt: skip
        elif self.world_size > 1:
            mode = GradientMode(not self.local_loss, self.gather_with_grad, self.ring)
            world = ("ClipLoss", self.rank, self.world_size)
            loss = distributed_loss(
                "softmax", *inputs, self.process_group, mode, self.uneven,
                self._described("ClipLoss", ids=None, weights=None), self.normalize, self.backend,
                self.memory_budget, live, world,
            )  # fmt: skip
        else:
            loss = clip_loss(
                *inputs, ids=ids, same_id=self.same_id, label_smoothing=self.label_smoothing,
                weights=weights, normalize=self.normalize, reduction=self.reduction,
                backend=backend_in_trace(self.backend), live=live,
                memory_budget=self.memory_budget,
            )  # fmt: skip
        return {"contrastive_loss": loss} if output_dict else loss

    def _check_exact(self, live: tuple[int, int] | None) -> None:
        """Checks a call across ranks with ids, weights, label_smoothing or a reduction."""
        check_no_live(live)
        if self.local_loss and not self.gather_with_grad:
            raise ValueError(
                "ids, weights, label_smoothing and a reduction other than 'mean' need "
                "local_loss=False or gather_with_grad=True, got neither"
            )

    def _described(self, name: str, **given: Any) -> str:
        return described(
            name, **given, reduction=self.reduction, same_id=self.same_id,
            label_smoothing=self.label_smoothing, local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
        )  # fmt: skip

    def _shares(
        self, name: str, x: Tensor, y: Tensor, losses: Callable[..., tuple[Tensor, ...]],
        check: Callable[[], None] = lambda: None, **given: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Calls formulas of (world, x, y) in one process or across ranks, with the values and
        gradients that `local_loss` and `gather_with_grad` stand for. given: further options that
        ranks compare."""
        options = (self.normalize, self.backend, self.memory_budget)
        if self.world_size == 1:
            check()
            return losses(one_process(*options), x, y)
        loss = self._described(name, **given)
        world = world_of_ranks(loss, self.process_group, self.ring, self.uneven, *options)

        def check_call() -> None:
            check()
            check_world(name, self.rank, self.world_size, self.process_group)
            check_features(x, y, may_be_empty=self.uneven)

        world.guarded(check_call)
        if not self.local_loss and not self.gather_with_grad:
            # open_clip's gradient of the features, but not of the scale, is too small by the number
            # of ranks.
            part = torch.full((), 1 / world.ranks, device=x.device)
            x, y = (WeighedGradient.apply(t, part) for t in (x, y))
        shares = losses(world, x, y)
        if self.local_loss or self.reduction == "none":
            return shares
        # open_clip's value is that of all pairs.
        return tuple(
            world.total(share.detach()) / world.ranks + (share - share.detach()) for share in shares
        )
