"""Cross-entropies of lines: InfoNCE with its variants, one way or both."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.autograd import WeighedGradient, refuse_forward_mode
from ..engine.checks import check_features, check_number, check_positives, check_sides, scalar
from ..engine.dtypes import state_dtype
from ..kinds import LineStatistics
from .reduction import Reduction
from .world import World

NAMES = ("queries", "keys")


class InfoNCE(NamedTuple):
    """The options of `fastclip.loss.info_nce`."""

    # Defaults of numbers are ints here and in the functions: a graph for all sizes would take a
    # float for a variable, and would be compiled again for each size when it decides a branch.

    offset: int | None = 0
    labels: Tensor | None = None
    ids: tuple[Tensor, Tensor] | Tensor | None = None
    same_id: str = "ignore"
    false_negative_margin: Tensor | float | None = None
    key_bias: Tensor | None = None
    margin: float = 0
    label_smoothing: float = 0
    decoupled: bool = False
    hardness: float = 0
    symmetric: bool = False

    def check(self, x: Tensor, y: Tensor | None) -> None:
        """Checks the features, the options that `contrast` does not have, and that no two options
        exclude each other."""
        if y is None or self.labels is not None:
            check_sides(x, x if y is None else y, may_be_empty=True, names=NAMES)
        else:
            check_positives(x, y, self.offset, self.same_id, NAMES)
        check_number("margin", self.margin)
        check_number("label_smoothing", self.label_smoothing, 0.0, 1.0)
        check_number("hardness", self.hardness, 0.0)
        together = {
            "labels and symmetric=True": self.labels is not None and self.symmetric,
            "label_smoothing and margin": self.label_smoothing and self.margin,
            "label_smoothing and hardness": self.label_smoothing and self.hardness,
            "label_smoothing and false_negative_margin":
                self.label_smoothing and self.false_negative_margin is not None,
            "hardness and same_id='positive'": self.hardness and self.same_id == "positive",
            "symmetric=True and offset=None": self.symmetric and self.offset is None,
        }  # fmt: skip
        if found := [name for name, both in together.items() if both]:
            raise ValueError(f"these options exclude each other, got both: {', '.join(found)}")


def info_nce(
    world: World, x: Tensor, y: Tensor | None, logit_scale: Tensor | float, options: InfoNCE,
    reduction: Reduction,
) -> Tensor:  # fmt: skip
    """The loss of rows x (M, D) and keys y (N, D); y=None: x is contrasted with itself."""

    def check() -> Tensor:
        scale = check_info_nce(world, x, y, logit_scale, options, reduction)
        if options.hardness:
            refuse_forward_mode(x, y, scale)
        return scale

    scale = world.guarded(check)
    o = options
    rows, whole = x, scale
    if o.hardness:
        # Negatives have the logits (scale + hardness) * t, with a constant hardness * t: gradients
        # of features are those of scale * t.
        whole = scale.to(state_dtype(x.device)) + o.hardness
        rows = WeighedGradient.apply(x, scale / whole)
        y = WeighedGradient.apply(y, scale / whole)
    c = world.contrast(
        rows, y, whole, offset=o.offset, labels=o.labels, ids=o.ids, same_id=o.same_id,
        false_negative_margin=o.false_negative_margin, key_bias=o.key_bias, columns=o.symmetric,
        means=bool(o.label_smoothing) or o.same_id == "positive",
    )  # fmt: skip
    positives = c.positives
    if o.hardness:
        positives = positives - o.hardness * _similarity(positives, whole, o)
    losses, counts = _line_losses(o, scale, c.rows, positives, c.row_positives, _means(c, "row"))
    if o.symmetric:
        columns, by_id, *means = (
            None if t is None else t[o.offset : o.offset + losses.shape[0]]
            for t in (c.columns, c.column_positives, *_means(c, "column"))
        )
        others, _ = _line_losses(o, scale, columns, positives, by_id, means)
        losses = (losses + others) / 2
    return reduction.of(losses, world, (x, x if y is None else y), counts)


def check_info_nce(
    world: World, x: Tensor, y: Tensor | None, logit_scale: Tensor | float, options: InfoNCE,
    reduction: Reduction,
) -> Tensor:  # fmt: skip
    """Checks what `contrast` does not check; returns the scale."""
    options.check(x, y)
    reduction.check(x, world)
    return scalar("logit_scale", logit_scale, x)


def clip(
    world: World, x: Tensor, y: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None, options: InfoNCE, reduction: Reduction,
) -> Tensor:  # fmt: skip
    """The loss of pairs x, y (N, D), both ways. The bias cancels."""

    def check() -> Tensor | None:
        check_features(x, y, may_be_empty=True)
        return None if logit_bias is None else scalar("logit_bias", logit_bias, x)

    bias = world.guarded(check)
    options = options._replace(ids=pair_of(options.ids))
    loss = info_nce(world, x, y, logit_scale, options, reduction)
    # The gradient of the bias is exactly 0, but not None.
    return loss if bias is None else loss + 0 * bias.reshape(()).to(loss.dtype)


def pair_of(
    ids: tuple[Tensor, Tensor] | Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """The ids of both sides; one tensor stands for both."""
    return (ids, ids) if isinstance(ids, Tensor) else ids


def _similarity(positives: Tensor, scale: Tensor, options: InfoNCE) -> Tensor:
    """The own positives' t, without gradient, from their logits."""
    logits = positives.detach()
    if options.key_bias is not None:
        if options.labels is None:
            columns = torch.arange(logits.shape[0], device=logits.device) + options.offset
        else:
            columns = options.labels.long()
        bias = options.key_bias.detach()[columns]
        # A key that is taken out has the logit -inf, whatever its similarity.
        logits = torch.where(bias == -torch.inf, 0, logits - bias)
    return logits / scale.detach()


def _means(c: LineStatistics, line: str) -> tuple[Tensor | None, Tensor | None]:
    return getattr(c, f"{line}_means"), getattr(c, f"{line}_positive_means")


def _line_losses(
    o: InfoNCE, scale: Tensor, negatives: Tensor, own: Tensor | None, by_id: Tensor | None,
    means: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The losses of lines, and which lines count (None: all).

    negatives, by_id: log-sum-exps; own: the own positives' logits. Positives stay apart from
    negatives, because their difference would cancel.
    """
    of_pairs, positive = means
    shift = scale.reshape(()).to(negatives.dtype) * o.margin if o.margin else 0.0
    if by_id is None:
        positive, counts = own - shift, None
        gap = negatives - positive
        losses = gap if o.decoupled else F.softplus(gap, threshold=60)
    else:
        counts = by_id != -torch.inf  # NaN counts
        negatives, by_id, positive = (
            torch.where(counts, t, 0) for t in (negatives, by_id - shift, positive - shift)
        )
        if o.decoupled:
            losses = negatives - positive
        else:
            losses = F.softplus(negatives - by_id, threshold=60) + (by_id - positive)
        losses = torch.where(counts, losses, 0)
    if o.label_smoothing:
        # A key that is taken out has the logit -inf, and its query an infinite loss.
        gap = torch.where(positive == -torch.inf, 0, positive - of_pairs)
        smoothing = o.label_smoothing * gap
        losses = losses + (smoothing if counts is None else torch.where(counts, smoothing, 0))
    return losses, counts
