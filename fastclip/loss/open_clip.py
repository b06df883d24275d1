"""open_clip's loss classes (3.3.0) with the same signatures, without the N x N matrices.

They take what open_clip's models return: normalised features and an exponentiated `logit_scale`.
With a world size above 1 they compute the losses of `fastclip.distributed`.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import gather_features
from ..distributed.gradient_mode import GradientMode
from ..distributed.losses import distributed_loss
from ..engine.compile_marks import constant_in_graphs
from .clip import clip_loss
from .siglip import siglip_loss


def _overrides(loss: nn.Module, base: type[nn.Module], others: tuple[str, ...] = ()) -> bool:
    """True if a subclass makes its own logits or labels, so that the loss must be dense."""
    return any(
        getattr(type(loss), name) is not getattr(base, name)
        for name in ("get_logits", "get_ground_truth", *others)
    )


def _open_clip_logits(
    x: Tensor, y: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None
) -> Tensor:
    logits = logit_scale * x @ y.T
    return logits if logit_bias is None else logits + logit_bias


def _refuse_live(live: tuple[int, int] | None) -> None:
    if live is not None:
        raise ValueError(
            f"live must be None for a loss that makes its own logits or labels, got {live!r}"
        )


@functools.cache
def _warn_of_direction() -> None:
    warnings.warn(
        "ClipLoss(local_loss=True, gather_with_grad=False) returns open_clip's gradient, which "
        "leaves out what other ranks' losses contribute: it is not the gradient of the loss, and "
        "even its direction is off; gather_with_grad=True is exact",
        stacklevel=5,  # the caller of the module, past two frames of nn.Module
    )


# A graph cannot hold a warning.
@constant_in_graphs
def _warn_while_compiling() -> None:
    _warn_of_direction()


class ClipLoss(nn.Module):
    """open_clip's `ClipLoss`, without parameters or buffers.

    `get_logits` and `get_ground_truth` are dense, as in open_clip, for subclasses that call them.
    If a subclass overrides one of them, the loss is the dense loss of what it returns.

    Args:
        local_loss, gather_with_grad: which value and which gradients a rank gets; see the table in
            `fastclip.distributed`. True, True is exact; True, False warns once.
        cache_labels: keep the labels of `get_ground_truth`.
        rank, world_size: those of this process within `process_group`.
        use_horovod: must be False.
        process_group, ring, uneven: as in `fastclip.distributed.clip_loss`.

    Raises:
        ValueError: use_horovod=True; at a call, a rank or world size that is not the group's.
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
            logits = _open_clip_logits(image_features, text_features, logit_scale, logit_bias)
            return logits, logits.T
        images, texts = gather_features(
            image_features, text_features, local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad, rank=self.rank, world_size=self.world_size,
            process_group=self.process_group,
        )  # fmt: skip
        if not self.local_loss:
            logits = _open_clip_logits(images, texts, logit_scale, logit_bias)
            return logits, logits.T
        return (
            _open_clip_logits(image_features, texts, logit_scale, logit_bias),
            _open_clip_logits(text_features, images, logit_scale, logit_bias),
        )

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        live: tuple[int, int] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or `{"contrastive_loss": loss}`; `live` as in `fastclip.clip_loss`."""
        inputs = (image_features, text_features, logit_scale, logit_bias)
        if self.world_size > 1 and self.local_loss and not self.gather_with_grad:
            if torch.compiler.is_compiling():
                _warn_while_compiling()
            else:
                _warn_of_direction()
        if _overrides(self, ClipLoss):
            _refuse_live(live)
            per_image, per_text = self.get_logits(*inputs)
            labels = self.get_ground_truth(image_features.device, per_image.shape[0])
            loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        elif self.world_size > 1:
            mode = GradientMode(not self.local_loss, self.gather_with_grad, self.ring)
            world = ("ClipLoss", self.rank, self.world_size)
            loss = distributed_loss(
                "softmax", *inputs, self.process_group, mode, self.uneven, live=live, world=world
            )
        else:
            loss = clip_loss(*inputs, live=live)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """open_clip's `SigLipLoss`, without parameters or buffers.

    If a subclass overrides `get_logits`, `get_ground_truth` or `_loss`, the loss is the dense loss
    of what they return, one rank's texts after another.

    Args:
        cache_labels: has no effect.
        rank, world_size: those of this process within `process_group`.
        dist_impl: how texts reach a rank: "bidir" (also None) and "shift" around a ring, "reduce"
            and "gather" by an all-gather. Values and gradients are the same.
        chunk_size: has no effect; memory is bounded without it.
        process_group, uneven: as in `fastclip.distributed.siglip_loss`.

    Raises:
        ValueError: an unknown dist_impl, or a rank or world size that is not the group's.
    """

    DIST_IMPLS = ("bidir", "shift", "reduce", "gather")

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        process_group: dist.ProcessGroup | None = None,
        uneven: bool = False,
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in self.DIST_IMPLS:
            raise ValueError(
                f"dist_impl must be None or one of {self.DIST_IMPLS}, got {dist_impl!r}"
            )
        self.chunk_size = chunk_size
        self.process_group = process_group
        self.uneven = uneven
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """(num_logits, num_logits): 1 for positives, -1 for negatives."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Dense logits (N, N)."""
        return _open_clip_logits(image_features, text_features, logit_scale, logit_bias)

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """open_clip's hook: the loss of one block of texts. It is dense for other ranks' texts
        (`negative_only`), and if a subclass makes its own logits or labels."""
        if not negative_only and not _overrides(self, SigLipLoss):
            return siglip_loss(image_features, text_features, logit_scale, logit_bias)
        logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        n = image_features.shape[0]
        labels = self.get_ground_truth(
            image_features.device, image_features.dtype, n, negative_only=negative_only
        )
        return -F.logsigmoid(labels * logits).sum() / n

    def _dense_across(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
    ) -> Tensor:
        _, texts = gather_features(
            image_features, text_features, gather_with_grad=True, rank=self.rank,
            world_size=self.world_size, process_group=self.process_group,
        )  # fmt: skip
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        for rank, others in enumerate(texts.chunk(self.world_size)):
            if rank != self.rank:
                loss = loss + self._loss(
                    image_features, others, logit_scale, logit_bias, negative_only=True
                )
        return loss

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
        live: tuple[int, int] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or `{"contrastive_loss": loss}`; `live` as in `fastclip.clip_loss`."""
        inputs = (image_features, text_features, logit_scale, logit_bias)
        if _overrides(self, SigLipLoss, ("_loss",)):
            _refuse_live(live)
            across = self._dense_across if self.world_size > 1 else self._loss
            loss = across(*inputs)
        elif self.world_size > 1:
            mode = GradientMode(ring=self.dist_impl in ("bidir", "shift"))
            world = ("SigLipLoss", self.rank, self.world_size)
            loss = distributed_loss(
                "sigmoid", *inputs, self.process_group, mode, self.uneven, live=live, world=world
            )
        else:
            loss = siglip_loss(*inputs, live=live)
        return {"contrastive_loss": loss} if output_dict else loss
