"""The public losses: drop-ins for the ones in open_clip, and the functions beneath them.

The similarity matrix is never built: memory is O(N D) in the forward and in the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .backends import choose
from .function import REDUCTIONS, Plan, fused_loss
from .inputs import check_features, product_dtype, scalar

# Work space that may hold products for the backward on CPUs, where a product costs more than the
# memory traffic of keeping it. On GPUs it is the other way round.
CPU_MEMORY_BUDGET = 256 << 20


def clip_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """CLIP's symmetric softmax loss without its N x N matrix. Equivalent to:

        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    (Radford et al., arXiv 2103.00020). The textbook form without temperature, the sum over pairs of
    both directions' cross-entropy, is `2 * clip_loss(x, y, 1.0, normalize=True, reduction="sum")`.

    Args:
        image_features: (N, D), float64, float32, bfloat16 or float16, any strides. Row i pairs with
            row i of the text features. Taken as they are: open_clip's are normalised already.
        text_features: (N, D). Mixed dtypes promote as torch does; under autocast both are taken in
            the autocast dtype, as the matmul would, but logits and loss stay in float32.
        logit_scale: already exponentiated; a number or a tensor of one element, 0-dim or [1].
        logit_bias: accepted because SigLIP models emit one. It cancels: its gradient is exactly 0.
        normalize: divide rows by max(norm, 1e-12) first, fused; gradients are then those of the
            features as given.
        reduction: "mean", "sum", or "none" for (N,) losses, half the row's plus half the column's
            cross-entropy.
        backend: None picks the fastest that can run; see `fastclip.backends()`.
        memory_budget: bytes of work space in which products may wait for the backward instead of
            being recomputed. Default: 256 MiB on CPUs, 0 on GPUs. Results do not depend on it
            beyond rounding. On CPUs they stay with the process for the next step:
            `fastclip.release_workspace()` frees them.

    Returns:
        The loss in float32 (float64 for float64 features), on the features' device. The gradients
        have their input's dtype and shape and are those of the returned loss, exactly; they have no
        second derivative.

    Raises:
        TypeError: features that are no tensors or not floating point, or a DTensor.
        ValueError: shapes or devices that do not fit, an empty batch, an unknown reduction, a
            backend that is unknown or cannot run here, a negative budget.
    """
    return _loss(
        "softmax", image_features, text_features, logit_scale, logit_bias,
        normalize, reduction, backend, memory_budget,
    )  # fmt: skip


def siglip_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """SigLIP's pairwise sigmoid loss without its N x N matrix. Equivalent to:

        logits = logit_scale * image_features @ text_features.T + logit_bias
        labels = 2 * torch.eye(len(logits)) - 1
        loss = -F.logsigmoid(labels * logits).sum() / len(logits)

    (Zhai et al., arXiv 2303.15343). Per pair, `reduction="none"` gives the positive's term plus
    half of the row's and half of the column's negatives.

    Args, Returns, Raises: as `clip_loss`; here `logit_bias` has a gradient. For a scalar reduction
    the gradients are made in the forward, which saves a quarter of the work, and wait as float32
    for the backward: on CPUs, for half features, only within `memory_budget`.
    """
    return _loss(
        "sigmoid", image_features, text_features, logit_scale, logit_bias,
        normalize, reduction, backend, memory_budget,
    )  # fmt: skip


_REFERENCES = {"softmax": reference.clip_loss, "sigmoid": reference.siglip_loss}


def _loss(
    loss: str, x: Tensor, y: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None,
    normalize: bool, reduction: str, backend: str | None, memory_budget: int | None,
) -> Tensor:  # fmt: skip
    check_features(x, y)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    scale = scalar("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else scalar("logit_bias", logit_bias, x)
    dtype = product_dtype(x, y)
    if memory_budget is None:
        memory_budget = CPU_MEMORY_BUDGET if x.device.type == "cpu" else 0
    elif isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 0:
        raise ValueError(f"memory_budget must be a number of bytes >= 0, got {memory_budget!r}")
    engine = choose(backend, x.device, dtype)
    if engine == "reference":
        return _REFERENCES[loss](x, y, scale, bias, normalize=normalize, reduction=reduction)
    return fused_loss(
        x, y, scale, bias, Plan(loss, engine, dtype, normalize, reduction, memory_budget)
    )


def _one_process(name: str, world_size: int) -> None:
    if world_size != 1:
        raise ValueError(
            f"{name}: world_size must be 1, the loss of one process, got {world_size}; "
            "losses across processes are not part of this version"
        )


def _overrides(loss: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a subclass makes logits or labels of its own: then they must be made, densely."""
    return any(
        getattr(type(loss), name) is not getattr(base, name)
        for name in ("get_logits", "get_ground_truth")
    )


def _dense_logits(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
) -> Tensor:
    logits = logit_scale * image_features @ text_features.T
    return logits if logit_bias is None else logits + logit_bias


class ClipLoss(nn.Module):
    """open_clip's `ClipLoss` (3.3.0), call by call, without the N x N matrices.

    Features arrive normalised and `logit_scale` exponentiated, as open_clip's models emit them; no
    parameters, no buffers. `get_logits` and `get_ground_truth` are open_clip's, dense, for
    subclasses that call them; a subclass that overrides one gets the dense loss of what it returns.

    Args:
        local_loss, gather_with_grad, rank: without effect in one process.
        cache_labels: keep `get_ground_truth`'s labels.
        world_size: must be 1.
        use_horovod: must be False.

    Raises:
        ValueError: another world size, or Horovod.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        _one_process("ClipLoss", world_size)
        if use_horovod:
            raise ValueError("ClipLoss: use_horovod must be False, got True: use torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """(num_logits,) int64: the index of each row's positive."""
        labels = self.labels.get(device) if self.cache_labels else None
        if labels is None or len(labels) != num_logits:
            labels = torch.arange(num_logits, device=device, dtype=torch.long)
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
        """Dense logits per image (N, N) and per text (N, N)."""
        logits = _dense_logits(image_features, text_features, logit_scale, logit_bias)
        return logits, logits.T

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or `{"contrastive_loss": loss}`."""
        if _overrides(self, ClipLoss):
            per_image, per_text = self.get_logits(
                image_features, text_features, logit_scale, logit_bias
            )
            labels = self.get_ground_truth(image_features.device, per_image.shape[0])
            loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        else:
            loss = clip_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """open_clip's `SigLipLoss` (3.3.0), call by call, without the N x N matrices.

    A subclass that overrides `get_logits` or `get_ground_truth` gets the dense loss of what they
    return.

    Args:
        cache_labels, rank: without effect in one process.
        world_size: must be 1.
        dist_impl: "bidir" (also None), "shift", "reduce" or "gather"; no effect in one process.
        chunk_size: accepted; memory is bounded without it.

    Raises:
        ValueError: another world size, or an unknown dist_impl.
    """

    DIST_IMPLS = ("bidir", "shift", "reduce", "gather")

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        _one_process("SigLipLoss", world_size)
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in self.DIST_IMPLS:
            raise ValueError(
                f"dist_impl must be None or one of {self.DIST_IMPLS}, got {dist_impl!r}"
            )
        self.chunk_size = chunk_size
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
        return _dense_logits(image_features, text_features, logit_scale, logit_bias)

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """open_clip's hook for one block; dense where no pair is a positive."""
        if not negative_only and not _overrides(self, SigLipLoss):
            return siglip_loss(image_features, text_features, logit_scale, logit_bias)
        logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        n = image_features.shape[0]
        labels = self.get_ground_truth(
            image_features.device, image_features.dtype, n, negative_only=negative_only
        )
        return -F.logsigmoid(labels * logits).sum() / n

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or `{"contrastive_loss": loss}`."""
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss
