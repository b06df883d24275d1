"""The losses as modules: options are given once, and a call may be across ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import distributed
from .info_nce import info_nce
from .loss_module import LossModule
from .nt_xent import nt_xent_loss
from .ranking import ranking_loss
from .supcon import supcon_loss


class _FunctionLoss(LossModule):
    """A loss without parameters or buffers, which calls a function.

    Args:
        reduction: as in the loss's function.
        options: those of `LossModule`.
    """

    def __init__(self, *, reduction: str = "mean", **options: Any) -> None:
        super().__init__(**options)
        self.reduction = reduction

    def _call(self, function: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
        """Calls a function of `fastclip.loss`, or the one of its name across ranks."""
        options |= {
            "normalize": self.normalize, "reduction": self.reduction, "backend": self.backend,
            "memory_budget": self.memory_budget,
        }  # fmt: skip
        if self.across_ranks:
            function = getattr(distributed, function.__name__)
            options |= {
                "process_group": self.process_group, "ring": self.ring, "uneven": self.uneven
            }  # fmt: skip
        return function(*inputs, **options)


class InfoNCELoss(_FunctionLoss):
    """`fastclip.loss.info_nce` as a module. Its keyword options are those of `info_nce` that do not
    depend on the batch, and those of every loss: normalize, reduction, backend, memory_budget,
    across_ranks, process_group, ring, uneven."""

    def __init__(
        self,
        *,
        margin: float = 0,
        label_smoothing: float = 0,
        decoupled: bool = False,
        hardness: float = 0,
        symmetric: bool = False,
        same_id: str = "ignore",
        false_negative_margin: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.margin = margin
        self.label_smoothing = label_smoothing
        self.decoupled = decoupled
        self.hardness = hardness
        self.symmetric = symmetric
        self.same_id = same_id
        self.false_negative_margin = false_negative_margin

    def forward(
        self,
        queries: Tensor,  # (M, D)
        keys: Tensor,  # (N, D)
        logit_scale: Tensor | float,
        *,
        offset: int | None = 0,
        labels: Tensor | None = None,
        ids: tuple[Tensor, Tensor] | None = None,
        key_bias: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss. The arguments are those of `fastclip.loss.info_nce`."""
        return self._call(
            info_nce, queries, keys, logit_scale, offset=offset, labels=labels, ids=ids,
            same_id=self.same_id, false_negative_margin=self.false_negative_margin,
            key_bias=key_bias, margin=self.margin, label_smoothing=self.label_smoothing,
            decoupled=self.decoupled, hardness=self.hardness, weights=weights,
            symmetric=self.symmetric,
        )  # fmt: skip


class SupConLoss(_FunctionLoss):
    """`fastclip.loss.supcon_loss` as a module. Its keyword options beside `decoupled` are those of
    every loss: normalize, reduction, backend, memory_budget, across_ranks, process_group, ring,
    uneven."""

    def __init__(self, *, decoupled: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.decoupled = decoupled

    def forward(
        self,
        features: Tensor,  # (N, D)
        labels: Tensor,  # (N)
        logit_scale: Tensor | float,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss. The arguments are those of `fastclip.loss.supcon_loss`."""
        return self._call(
            supcon_loss, features, labels, logit_scale, decoupled=self.decoupled, weights=weights
        )


class RankingLoss(_FunctionLoss):
    """`fastclip.loss.ranking_loss` as a module. Its keyword options beside margin, hardest and
    symmetric are those of every loss: normalize, reduction, backend, memory_budget, across_ranks,
    process_group, ring, uneven."""

    def __init__(
        self,
        *,
        margin: float = 0.2,
        hardest: bool = False,
        symmetric: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.margin = margin
        self.hardest = hardest
        self.symmetric = symmetric

    def forward(
        self,
        x: Tensor,  # (N, D)
        y: Tensor,  # (N, D)
        *,
        ids: tuple[Tensor, Tensor] | Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss. The arguments are those of `fastclip.loss.ranking_loss`."""
        return self._call(
            ranking_loss, x, y, margin=self.margin, hardest=self.hardest,
            symmetric=self.symmetric, ids=ids, weights=weights,
        )  # fmt: skip


class NTXentLoss(_FunctionLoss):
    """`fastclip.loss.nt_xent_loss` as a module. Its keyword options beside `decoupled` are those of
    every loss: normalize, reduction, backend, memory_budget, across_ranks, process_group, ring,
    uneven."""

    def __init__(self, *, decoupled: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.decoupled = decoupled

    def forward(
        self,
        x1: Tensor,  # (N, D)
        x2: Tensor,  # (N, D)
        logit_scale: Tensor | float,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss. The arguments are those of `fastclip.loss.nt_xent_loss`."""
        return self._call(
            nt_xent_loss, x1, x2, logit_scale, decoupled=self.decoupled, weights=weights
        )
