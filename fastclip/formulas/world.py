"""The world of a loss: one process, or ranks that share a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..kinds import LineStatistics


def _unchanged(value: Tensor) -> Tensor:
    return value


def _unguarded(check: Callable[[], Any]) -> Any:
    return check()


class Batch(NamedTuple):
    """The pairs of all ranks, with gradients, and where this rank's own begin."""

    x: Tensor
    y: Tensor
    x_ids: Tensor | None
    y_ids: Tensor | None
    start: int


def _own_batch(x: Tensor, y: Tensor, ids: tuple[Tensor, Tensor] | None) -> Batch:
    return Batch(x, y, *(ids or (None, None)), 0)


class World(NamedTuple):
    """The functions and numbers that a formula needs beside its inputs.

    contrast: `fastclip.contrast` or `fastclip.distributed.contrast`, with normalize, backend and
        the ranks' options already given.
    check_engine: raises for a backend or a budget with which `contrast` of x and y would raise.
    guarded: calls a check of arguments; if it raises, all ranks raise.
    total: sums a tensor over ranks, without a gradient.
    gather_rows: concatenates the ranks' rows, without a gradient.
    whole_batch: maps own pairs x, y and their ids to the batch of all ranks, with gradients.
    ranks: how many share the batch.
    """

    contrast: Callable[..., LineStatistics]
    check_engine: Callable[[Tensor, Tensor], None]
    guarded: Callable[[Callable[[], Any]], Any] = _unguarded
    total: Callable[[Tensor], Tensor] = _unchanged
    gather_rows: Callable[[Tensor], Tensor] = _unchanged
    whole_batch: Callable[..., Batch] = _own_batch
    ranks: int = 1
    even: bool = True  # all ranks have the same number of rows
