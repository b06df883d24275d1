"""The retrieval operators of the CPU engine (`csrc/cpu/retrieval_ops.cpp`): schemas and fakes.

Queries x (M, D) and keys y (N, D) have one dtype. ids_x (M), ids_y (N): int32, or both None; pairs
of equal ids are left out.

`pair_scores.cpu(x, y, i, j) -> scores`
    The exact scores (P), float64, of P pairs (i, j).

`ranks.cpu(x, y, own_rows, row_scores, own_columns, column_scores, first_query, rounding)
           -> rows, columns`
    How many keys come before each query's own, (M) int64, and how many queries before each key's
    own, (N), or (0) if own_columns is None. own_rows (M), own_columns (N): indices of the own ones,
    for ties; the queries' indices start at first_query. row_scores, column_scores: their exact
    scores, float64; infinite for a line without one. rounding: the relative error of the terms of
    products, if BLAS may round float32 operands.

`topk.cpu(x, y, k, max_score, ids_x, ids_y, excludes_own, rounding) -> scores, indices`
    (M, k) float64 and int64, in order; -inf and -1 beyond the last key.

`draw.cpu(x, y, scale, seed, ids_x, ids_y, excludes_own, offset, columns) -> rows, columns`
    A key for each query (M) and a query for each key (N), int64, -1 where there is none; (0) if the
    columns are not wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine.namespace import NAMESPACE, OPS

SCHEMAS = {
    "pair_scores": "(Tensor x, Tensor y, Tensor i, Tensor j) -> Tensor",
    "ranks": "(Tensor x, Tensor y, Tensor own_rows, Tensor row_scores, Tensor? own_columns, "
    "Tensor? column_scores, SymInt first_query, float rounding) -> (Tensor, Tensor)",
    "topk": "(Tensor x, Tensor y, SymInt k, float max_score, Tensor? ids_x, Tensor? ids_y, "
    "bool excludes_own, float rounding) -> (Tensor, Tensor)",
    "draw": "(Tensor x, Tensor y, float scale, int seed, Tensor? ids_x, Tensor? ids_y, "
    "bool excludes_own, SymInt offset, bool columns) -> (Tensor, Tensor)",
}


def _fake_pair_scores(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return x.new_empty(i.shape, dtype=torch.float64)


def _fake_ranks(
    x: Tensor, y: Tensor, own_rows: Tensor, row_scores: Tensor, own_columns: Any, *_: Any
) -> tuple[Tensor, Tensor]:
    count = 0 if own_columns is None else y.shape[0]
    return own_rows.new_empty((x.shape[0],)), own_rows.new_empty((count,))


def _fake_topk(x: Tensor, y: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], k
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.int64)


def _fake_draw(x: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    counts = x.shape[0], y.shape[0] if others[-1] else 0
    return tuple(x.new_empty((count,), dtype=torch.int64) for count in counts)


_FAKES = {
    "pair_scores": _fake_pair_scores, "ranks": _fake_ranks, "topk": _fake_topk, "draw": _fake_draw,
}  # fmt: skip

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    _library.define(f"{_name}.cpu{_schema}")
    torch.library.register_fake(f"{NAMESPACE}::{_name}.cpu", _FAKES[_name], lib=_library)

pair_scores = OPS.pair_scores.cpu
ranks = OPS.ranks.cpu
topk = OPS.topk.cpu
draw = OPS.draw.cpu
