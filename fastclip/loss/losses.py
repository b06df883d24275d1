"""The public losses of one process, as functions.

The similarity matrix is never built: memory is O(N D) in the forward and in the backward.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import reference
from ..distributed.block_row import GradientMode
from ..distributed.shard import shard_of_one
from ..distributed.sharded_loss import sharded_loss
from ..engine.backends import choose
from ..engine.checks import budget_of, check_features, check_live, product_dtype, scalar
from ..engine.fused_loss import REDUCTIONS, LossOptions, fused_loss
from ..engine.no_compile import no_compile


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
    live: tuple[int, int] | None = None,
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
        memory_budget: bytes of work space in which products (on GPUs with Triton: weights, 2 bytes
            a pair of half features) may wait for the backward instead of being recomputed.
            Default: 256 MiB on CPUs, 0 on GPUs. Results do not depend on it beyond rounding. On
            CPUs they stay with the process for the next step:
            `fastclip.release_workspace()` frees them.
        live: (start, stop), the pairs whose features this step differentiates, for accumulation
            over micro-batches: the others' features are in the batch as constants. Gradients of
            live features are those of the whole batch's loss. The value and the gradients of scale
            and bias are shares, which mean something in sum alone: over slices that cover the batch
            all of them add up to the whole batch's. CLIP's forward costs what it always does,
            SigLIP's and the backward `(stop - start) / N` of that, or 4/3 of it.
            `fastclip.cached_step` makes the loss once instead.

    Returns:
        The loss in float32 (float64 for float64 features), on the features' device. The gradients
        have their input's dtype and shape and are those of the returned loss, exactly (but see
        `live`); they have no second derivative.

    Raises:
        TypeError: features that are no tensors or not floating point, or a DTensor.
        ValueError: shapes or devices that do not fit, an empty batch, an unknown reduction, a
            backend that is unknown or cannot run here, a negative budget, live pairs that are not
            within the batch or that are to be reduced to "none".
    """
    return _loss(
        "softmax", reference.clip_loss, image_features, text_features, logit_scale, logit_bias,
        normalize, reduction, backend, memory_budget, live,
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
    live: tuple[int, int] | None = None,
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
        "sigmoid", reference.siglip_loss, image_features, text_features, logit_scale, logit_bias,
        normalize, reduction, backend, memory_budget, live,
    )  # fmt: skip


def _loss(
    kind: str, dense: Callable[..., Tensor], x: Tensor, y: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None, normalize: bool, reduction: str, backend: str | None,
    memory_budget: int | None, live: tuple[int, int] | None,
) -> Tensor:  # fmt: skip
    check_features(x, y)
    y = y if y is not x else y.view_as(y)  # a Function's inputs must be two tensors
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    scale = scalar("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else scalar("logit_bias", logit_bias, x)
    dtype = product_dtype(x, y)
    budget = budget_of(memory_budget, x.device)
    engine = choose(backend, x.device, dtype, x.shape[0] * y.shape[0], x.shape[1])
    if live is not None:
        live = check_live(live, x.shape[0])
        if reduction == "none" or engine == "reference":
            raise ValueError(
                'live pairs must be reduced to "mean" or "sum" by a fused engine, got '
                f"reduction={reduction!r}, backend={backend!r}"
            )
        options = LossOptions(kind, engine, dtype, normalize, "mean", budget)
        value = _live_loss(x, y, scale, bias, options, live)
        return value * x.shape[0] if reduction == "sum" else value
    if engine == "reference":
        return dense(x, y, scale, bias, normalize=normalize, reduction=reduction)
    return fused_loss(
        x, y, scale, bias, LossOptions(kind, engine, dtype, normalize, reduction, budget)
    )


@no_compile
def _live_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    live: tuple[int, int],
) -> Tensor:
    """One process is a rank without others."""
    return sharded_loss(x, y, scale, bias, options, shard_of_one(x, y, live), GradientMode())
