"""The operators' arguments in bundles: a block of logits, statistics, upstream factors, requests.

A schema holds tensors and numbers only (`operators.py`), so each bundle has the part of the schema
that it is flattened to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# An offset that no block reaches. It is a constant, so that a compiled graph serves every N.
NO_POSITIVES = 1 << 40


class Side(NamedTuple):
    """One side of a block: its rows or its columns, L lines."""

    features: Tensor  # (L, D)
    factor: Tensor | None = None  # (L): 1 / norm; None: 1
    ids: Tensor | None = None  # (L) int32: pairs with equal ids are not negatives
    threshold: Tensor | None = None  # (L): negatives with a larger t are left out of the line


class Block(NamedTuple):
    """Logits `s_ij = scale * t_ij + bias + key_bias_j` with
    `t_ij = <x_i, y_j> * factor_x_i * factor_y_j`."""

    x: Side  # M rows
    y: Side  # N columns
    scale: Tensor  # one element
    bias: Tensor | None = None  # one element
    key_bias: Tensor | None = None  # (N)
    offset: int = 0  # the own positive of row i is column i + offset, if the block has that column
    kind: str = "softmax"
    same_id_positive: bool = False  # pairs with equal ids are positives; else left out

    SCHEMA = (
        "Tensor x, Tensor? factor_x, Tensor? ids_x, Tensor? threshold_x,"
        " Tensor y, Tensor? factor_y, Tensor? ids_y, Tensor? threshold_y,"
        " Tensor scale, Tensor? bias, Tensor? key_bias, int offset, str kind,"
        " bool same_id_positive"
    )
    COUNT = SCHEMA.count(",") + 1  # of arguments

    def flat(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema."""
        return *self.x, *self.y, *self[2:]

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> tuple[Block, tuple[Any, ...]]:
        """Splits an operator's arguments into the block and the arguments after it."""
        half, sides = len(Side._fields), 2 * len(Side._fields)
        x, y = Side(*arguments[:half]), Side(*arguments[half:sides])
        return cls(x, y, *arguments[sides : cls.COUNT]), tuple(arguments[cls.COUNT :])

    def sizes(self) -> tuple[int, int]:
        """M and N. This is a method: Dynamo of torch 2.10 cannot read properties of a named tuple.
        `is_plain` may be a property, since no graph reads it."""
        return self.x.features.shape[0], self.y.features.shape[0]

    @property
    def is_plain(self) -> bool:
        """True without ids, thresholds and key_bias: then every pair but the own positives is a
        negative of its row and its column, and all logits have the same bias."""
        return self.x.ids is None and self.x.threshold is None and self.key_bias is None


class SweepResults(NamedTuple):
    """The results of `sweep`."""

    state: Tensor  # (2, M + N), or (4, M + N) with same_id_positive: float64
    positive: Tensor  # (M): t of the own positives
    kept: Tensor

    SCHEMA = "Tensor state, Tensor positive, Tensor kept"


class Upstream(NamedTuple):
    """The factors that multiply the activations in the weights of pairs."""

    coefficients: Tensor  # (M + N): a, b; or (2, M + N): a, b, then c, d
    positive_weight: Tensor  # (M)
    gain: Tensor  # one element

    SCHEMA = "Tensor coefficients, Tensor positive_weight, Tensor gain"


class Wanted(NamedTuple):
    """The gradients to compute, and their form."""

    x: bool
    y: bool
    key_bias: bool
    project: bool  # gradients with respect to the features before normalisation
    dtype_x: torch.dtype
    dtype_y: torch.dtype

    SCHEMA = (
        "bool needs_x, bool needs_y, bool needs_key_bias, bool project, ScalarType dtype_x,"
        " ScalarType dtype_y"
    )
