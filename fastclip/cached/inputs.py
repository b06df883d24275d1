"""Batches as nested containers of tensors, and their micro-batches."""

from __future__ import annotations

import copy
import operator
import sys
from collections import UserDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def sizes_of(batch: Any, micro_batch: Any, name: str) -> list[int]:
    """Returns the number of rows of each micro-batch of a batch, the last of which may be smaller.
    A batch of no rows is one empty micro-batch.

    Raises:
        ValueError: a micro_batch below 1, a batch without rows, with entries that differ in their
            number of rows, or with tensors that are part of a graph.
    """
    is_number = hasattr(micro_batch, "__index__") and not isinstance(micro_batch, bool)
    if not is_number or operator.index(micro_batch) < 1:
        raise ValueError(
            "micro_batch must be at least 1, or a pair of such numbers for two towers, got "
            f"{micro_batch!r}"
        )
    micro_batch = operator.index(micro_batch)
    entries = dict(_entries(batch, name))
    counts = {path: len(entry) for path, entry in entries.items()}
    if not counts:
        raise ValueError(
            "inputs must have tensors with a row for each pair, or lists of str, got none"
        )
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{path}: {count}" for path, count in counts.items())
        raise ValueError(f"all inputs must have one number of rows, got {each}")
    if torch.is_grad_enabled():
        for path, entry in entries.items():
            if isinstance(entry, Tensor) and entry.grad_fn is not None:
                raise ValueError(
                    "inputs must not be results of differentiable operations, because a graph "
                    "serves one backward and cached_step runs one for each micro-batch, got "
                    f"{path} with {entry.grad_fn.name()}: detach it, or compute it in the model"
                )
    rows = next(iter(counts.values()))
    whole, rest = divmod(rows, micro_batch)
    return [micro_batch] * whole + ([rest] if rest or not rows else [])


def rows_of(batch: Any, rows: slice) -> Any:
    """Returns these rows of every entry of a batch. Objects that are not rows are the same."""
    if is_rows(batch):
        return batch[rows]
    if not _has_rows(batch):
        return batch
    if isinstance(batch, Mapping):
        parts = {key: rows_of(value, rows) for key, value in batch.items()}
        # The copy of another mapping may share its entries with the caller's batch.
        if type(batch) is dict or not isinstance(batch, (dict, UserDict)):
            return parts
        # A type such as transformers' BatchEncoding keeps its attributes.
        result = copy.copy(batch)
        for key, value in parts.items():
            result[key] = value
        return result
    parts = [rows_of(value, rows) for value in batch]
    if hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*parts)
    return tuple(parts) if isinstance(batch, tuple) else parts


def tensors_of(batch: Any) -> list[Tensor]:
    """Returns the tensors of a batch that have rows."""
    return [entry for _, entry in _entries(batch, "") if isinstance(entry, Tensor)]


def _entries(batch: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields what has rows, with its place in the batch."""
    if is_rows(batch):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _entries(value, f"{path}[{key!r}]")
    elif isinstance(batch, (list, tuple)):
        for index, value in enumerate(batch):
            yield from _entries(value, f"{path}[{index}]")


def _has_rows(batch: Any) -> bool:
    return next(_entries(batch, ""), None) is not None


def is_rows(value: Any) -> bool:
    """True if a value has a row for each pair."""
    if isinstance(value, Tensor):
        return value.dim() > 0
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(item, (str, bytes)) for item in value)
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.ndim > 0
