"""open_clip's `DistillClipLoss`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...distributed.local_negatives import warn_of_local_negatives
from ...engine.checks import check_features, scalar
from ...formulas.distill import distill_clip
from ...formulas.reduction import Reduction
from .clip import ClipLoss
from .dense import overrides, refuse_options


class DistillClipLoss(ClipLoss):
    """open_clip's `DistillClipLoss`: CLIP's loss, and the cross-entropy of both directions with the
    teacher's softmax. One sweep over the student's and the teacher's logits computes both.

    The constructor's arguments are those of `ClipLoss`. The teacher's features get no gradients.
    With `local_loss=True, gather_with_grad=False`, whose gradient is not that of the loss, and in
    subclasses that make their own logits or labels, the loss is dense.

    Raises:
        ValueError: at a call, label_smoothing other than 0, same_id other than "ignore", or
            normalize or a reduction other than "mean" if the loss is dense; as `ClipLoss`.
    """

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: Tensor | float,
        dist_image_features: Tensor,  # (N, D')
        dist_text_features: Tensor,  # (N, D')
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
        *,
        logit_bias: Tensor | float | None = None,
        dist_logit_bias: Tensor | float | None = None,
        weights: Tensor | None = None,  # (N,), of both losses
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(CLIP's loss, distillation loss), or `{"contrastive_loss": ..., "distill_loss": ...}`.
        Biases cancel."""
        student = image_features, text_features, logit_scale
        teacher = dist_image_features, dist_text_features, dist_logit_scale

        def check() -> None:
            self._check_options()
            check_features(image_features, text_features, may_be_empty=self.uneven)
            biases = {"logit_bias": logit_bias, "dist_logit_bias": dist_logit_bias}
            for name, bias in biases.items():
                if bias is not None:
                    scalar(name, bias, image_features)

        if self.world_size == 1:
            warn_of_local_negatives(type(self).__name__, self.process_group)
        if overrides(self, ClipLoss) or (
            self.world_size > 1 and self.local_loss and not self.gather_with_grad
        ):
            check()
            refuse_options(
                "a dense DistillClipLoss", normalize=self.normalize, weights=weights is not None,
                reduction=self.reduction != "mean",
            )  # fmt: skip
            losses = self._dense(student, teacher)
        else:
            losses = self._shares(
                "DistillClipLoss", image_features, text_features,
                lambda world, x, y: distill_clip(
                    world, x, y, logit_scale, *teacher, Reduction(self.reduction, weights)
                ),
                check, weights=weights,
            )  # fmt: skip
        if isinstance(logit_bias, Tensor):
            losses = tuple(loss + 0 * logit_bias.reshape(()).to(loss.dtype) for loss in losses)
        if output_dict:
            return dict(zip(("contrastive_loss", "distill_loss"), losses, strict=True))
        return losses

    def _check_options(self) -> None:
        if self.label_smoothing:
            raise ValueError(
                f"label_smoothing must be 0 for DistillClipLoss, got {self.label_smoothing}"
            )
        if self.same_id != "ignore":
            raise ValueError(f"same_id must be 'ignore' for DistillClipLoss, got {self.same_id!r}")

    def _dense(
        self, student: tuple[Tensor, Tensor, Tensor | float],
        teacher: tuple[Tensor, Tensor, Tensor | float],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        own = self.get_logits(*student)
        taught = [logits.detach() for logits in self.get_logits(*teacher)]
        labels = self.get_ground_truth(student[0].device, own[0].shape[0])
        contrastive = sum(F.cross_entropy(logits, labels) for logits in own) / 2
        distill = sum(
            -(target.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            for logits, target in zip(own, taught, strict=True)
        ) / 2  # fmt: skip
        return contrastive, distill
