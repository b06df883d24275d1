"""A rectangular block of logits and what is asked about it: the operators' arguments, in bundles.

Schemas know tensors and numbers only (`ops.py`), so every bundle says how it is laid out there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# An offset that no block reaches; a number of its own, so that a compiled graph serves every N.
NO_POSITIVES = 1 << 40


class Side(NamedTuple):
    """The rows or the columns of a block: L lines."""

    features: Tensor  # (L, D)
    factor: Tensor | None = None  # (L): 1 / norm; None: features are taken as they are
    ids: Tensor | None = None  # (L) int32: pairs of equal ids are no negatives
    threshold: Tensor | None = None  # (L): a negative of larger t does not count for this line


class Block(NamedTuple):
    """Logits `s_ij = scale * t_ij + bias + key_bias_j` with
    `t_ij = <x_i, y_j> * factor_x_i * factor_y_j`."""

    x: Side  # M rows
    y: Side  # N columns
    scale: Tensor  # one element
    bias: Tensor | None = None  # one element
    key_bias: Tensor | None = None  # (N)
    offset: int = 0  # the own positive of row i is column i + offset, where that lies in the block
    kind: str = "softmax"
    same_id_positive: bool = False  # pairs of equal ids are positives; else they are left out

    SCHEMA = (
        "Tensor x, Tensor? factor_x, Tensor? ids_x, Tensor? threshold_x,"
        " Tensor y, Tensor? factor_y, Tensor? ids_y, Tensor? threshold_y,"
        " Tensor scale, Tensor? bias, Tensor? key_bias, int offset, str kind,"
        " bool same_id_positive"
    )
    COUNT = SCHEMA.count(",") + 1  # of arguments

    def flat(self) -> tuple[Any, ...]:
        """In the order of the schema."""
        return *self.x, *self.y, *self[2:]

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> tuple[Block, tuple[Any, ...]]:
        """The block that an operator's arguments begin with, and the arguments that follow it."""
        half, sides = len(Side._fields), 2 * len(Side._fields)
        x, y = Side(*arguments[:half]), Side(*arguments[half:sides])
        return cls(x, y, *arguments[sides : cls.COUNT]), tuple(arguments[cls.COUNT :])

    def sizes(self) -> tuple[int, int]:
        """M and N. No property: Dynamo of torch 2.10 reads none of a named tuple."""
        return self.x.features.shape[0], self.y.features.shape[0]

    @property
    def is_plain(self) -> bool:
        """Every pair but the own positives is a negative of both of its lines."""
        return self.x.ids is None and self.x.threshold is None and self.key_bias is None


class Statistics(NamedTuple):
    """The results of `sweep`."""

    state: Tensor  # (2, M + N), or (4, M + N) with same_id_positive: float64
    positive: Tensor  # (M): t of the own positives
    kept: Tensor

    SCHEMA = "Tensor state, Tensor positive, Tensor kept"


class Upstream(NamedTuple):
    """The factors of pairs' weights beside their activations."""

    coefficients: Tensor  # (M + N): a, b; or (2, M + N): a, b, then c, d
    positive_weight: Tensor  # (M)
    gain: Tensor  # one element

    SCHEMA = "Tensor coefficients, Tensor positive_weight, Tensor gain"


class Wanted(NamedTuple):
    """Which gradients, and how."""

    x: bool
    y: bool
    key_bias: bool
    project: bool  # to the features before they were normalised by the factors
    dtype_x: torch.dtype
    dtype_y: torch.dtype

    SCHEMA = (
        "bool needs_x, bool needs_y, bool needs_key_bias, bool project, ScalarType dtype_x,"
        " ScalarType dtype_y"
    )
