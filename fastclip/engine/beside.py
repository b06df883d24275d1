"""The arguments of `contrast` beside its differentiable inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Given(NamedTuple):
    """These arguments as the caller passed them."""

    ids: tuple[Tensor, Tensor] | Tensor | None = None
    margin: Tensor | float | None = None
    labels: Tensor | None = None
    targets: Sequence[Tensor | float] | None = None
    guide: Sequence[Tensor] | Tensor | None = None
    limits: Tensor | None = None


class Beside(NamedTuple):
    """The same arguments, checked. None of them gets a gradient."""

    ids: tuple[Tensor, Tensor] | None = None
    margin: Tensor | None = None  # one element
    labels: Tensor | None = None  # (M): the columns of the rows' own positives
    target_x: Tensor | None = None  # (M, D'): features of a teacher or a guide
    target_y: Tensor | None = None  # (N, D')
    target_scale: Tensor | None = None  # one element: the targets are a teacher
    limits: Tensor | None = None  # (M): the largest similarities that negatives of rows may have
    guided: bool = False  # the targets are a guide: limits and margin are compared with its t

    def targets(self) -> tuple[Tensor, ...]:
        """The features of a teacher or a guide, if there is one."""
        return () if self.target_x is None else (self.target_x, self.target_y)
