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
    target: Tensor | None = None  # (L, D'): features of a second pair of towers, without gradients
    target_factor: Tensor | None = None  # (L): their factor


class Block(NamedTuple):
    """Logits `s_ij = scale * t_ij + bias + key_bias_j` with
    `t_ij = <x_i, y_j> * factor_x_i * factor_y_j`.

    Targets have products t'_ij of their own. As a guide, they are compared with the thresholds in
    the place of t_ij. As a teacher, with a scale, they give each line weights: the softmax of
    `target_scale * t'_ij` over all its pairs.
    """

    x: Side  # M rows
    y: Side  # N columns
    scale: Tensor  # one element
    bias: Tensor | None = None  # one element
    key_bias: Tensor | None = None  # (N)
    target_scale: Tensor | None = None  # one element; None without a teacher
    offset: int = 0  # the own positive of row i is column i + offset, if the block has that column
    kind: str = "softmax"
    same_id_positive: bool = False  # pairs with equal ids are positives; else left out
    guided: bool = False  # thresholds are compared with t'

    SCHEMA = (
        "Tensor x, Tensor? factor_x, Tensor? ids_x, Tensor? threshold_x,"
        " Tensor? target_x, Tensor? target_factor_x,"
        " Tensor y, Tensor? factor_y, Tensor? ids_y, Tensor? threshold_y,"
        " Tensor? target_y, Tensor? target_factor_y,"
        " Tensor scale, Tensor? bias, Tensor? key_bias, Tensor? target_scale,"
        " int offset, str kind, bool same_id_positive, bool guided"
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

    def has_teacher(self) -> bool:
        """True if the sweep also sums t with the weights of the targets."""
        return self.target_scale is not None

    def state_rows(self) -> int:
        """The rows of a state: two for each set of pairs, three for a teacher."""
        return (4 if self.same_id_positive else 2) + (3 if self.has_teacher() else 0)

    @property
    def is_plain(self) -> bool:
        """True without ids, thresholds, key_bias and targets: then every pair but the own positives
        is a negative of its row and its column, and all logits have the same bias."""
        options = self.x.ids, self.x.threshold, self.key_bias, self.x.target
        return all(option is None for option in options)


class SweepResults(NamedTuple):
    """The results of `sweep`."""

    state: Tensor  # (2, M + N), (4, M + N) with same_id_positive, 3 more with a teacher: float64
    positive: Tensor  # (M): t of the own positives
    kept: Tensor

    SCHEMA = "Tensor state, Tensor positive, Tensor kept"


class Upstream(NamedTuple):
    """The factors that multiply the activations in the weights of pairs."""

    # (M + N): a, b; or (2 or 3, M + N), with further rows for positives by id and for a teacher.
    coefficients: Tensor
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
