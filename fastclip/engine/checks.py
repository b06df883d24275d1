"""Checks of the tensors and options that a user passes, and the values that follow from them.

The choice of an engine (`backends.py`) and the entry of a loss (`loss/base.py`) check backend and
reduction. An error states the rule, with what was expected, and what it got.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kinds import kind_of
from .autograd import is_traced, refuse_forward_mode
from .dtypes import FLOATING

# The meanings of equal ids.
SAME_ID = ("ignore", "positive")

# On CPUs a product costs more than the memory traffic of keeping it. On an H100, keeping all
# 65536 x 65536 weights in bf16 takes 8 GiB and saves 5 % of a step.
DEFAULT_BUDGETS = {"cpu": 256 << 20, "cuda": 0}

LARGEST_OFFSET = 1 << 62


def check_features(x: Tensor, y: Tensor, may_be_empty: bool = False) -> None:
    """Checks two towers' features, paired row by row."""
    names = "image_features", "text_features"
    for name, features in zip(names, (x, y), strict=True):
        _check_one(name, features, "(N, D)")
    if x.shape != y.shape:
        raise ValueError(
            "image_features and text_features must have one shape (N, D), got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    _check_together(names, x, y, may_be_empty)


def check_sides(x: Tensor, y: Tensor, may_be_empty: bool = False) -> None:
    """Checks the features of rows, x (M, D), and of columns, y (N, D)."""
    _check_one("x", x, "(M, D)")
    _check_one("y", y, "(N, D)")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"x (M, D) and y (N, D) must have one width D, got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    _check_together(("x", "y"), x, y, may_be_empty)


def _check_one(name: str, features: Tensor, shape: str) -> None:
    _check_tensor(name, features)
    if type(features) is not Tensor and type(features).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor: pass {name}.to_local() or "
            f"{name}.full_tensor()"
        )
    _check_floating(name, features)
    if features.dim() != 2:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(features.shape)}")


def _check_together(
    names: tuple[str, str], x: Tensor, y: Tensor, may_be_empty: bool = False
) -> None:
    for features in (x, y):
        if features.shape[1] == 0 or (features.shape[0] == 0 and not may_be_empty):
            raise ValueError(
                f"the batch must not be empty, got features of shape {tuple(features.shape)}"
            )
    if x.device != y.device:
        raise ValueError(
            f"{names[0]} and {names[1]} must be on one device, got {x.device} and {y.device}"
        )


def check_ids(
    ids: tuple[Tensor, Tensor] | None, same_id: str, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Checks ids of rows and columns, which are integers; returns them as a pair."""
    if same_id not in SAME_ID:
        raise ValueError(f"same_id must be one of {SAME_ID}, got {same_id!r}")
    if ids is None:
        if same_id == "positive":
            raise ValueError("same_id='positive' needs ids, got ids=None")
        return None
    if not isinstance(ids, Sequence) or len(ids) != 2:
        got = f"{len(ids)} of them" if isinstance(ids, Sequence) else type(ids).__name__
        raise TypeError(f"ids must be a pair of tensors (x_ids, y_ids), got {got}")
    for name, own, features in zip(("x_ids", "y_ids"), ids, (x, y), strict=True):
        _check_tensor(name, own)
        _check_integers(name, own)
        _check_vector(name, own, "an id for each row of the features", features)
    return ids[0], ids[1]


def check_key_bias(key_bias: Tensor | None, y: Tensor) -> None:
    """Checks a bias for each column."""
    if key_bias is None:
        return
    _check_tensor("key_bias", key_bias)
    _check_floating("key_bias", key_bias)
    _check_vector("key_bias", key_bias, "a bias for each column", y)


def _check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _check_integers(name: str, value: Tensor) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {value.dtype}")


def _check_floating(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}")


def _check_vector(name: str, vector: Tensor, rule: str, features: Tensor) -> None:
    """Checks that a vector has a number for each of the features, on their device."""
    lines = features.shape[0]
    if vector.shape != (lines,):
        raise ValueError(f"{name} must have {rule}, shape ({lines},), got {tuple(vector.shape)}")
    if vector.device != features.device:
        raise ValueError(
            f"{name} must be on the features' device {features.device}, got {vector.device}"
        )


def check_offset(offset: int | None) -> None:
    if offset is not None and (isinstance(offset, bool) or not isinstance(offset, int)):
        raise TypeError(f"offset must be an int or None, got {type(offset).__name__}")
    if offset is not None and not -LARGEST_OFFSET <= offset <= LARGEST_OFFSET:
        raise ValueError(f"offset must be within 2^62 of 0, got {offset}")


def check_labels(
    labels: Tensor | None, ids: tuple[Tensor, Tensor] | None, offset: int | None, x: Tensor,
    y: Tensor,
) -> None:  # fmt: skip
    """Checks the columns of the rows' own positives. Values are checked on CPUs only: reading them
    elsewhere would wait for the device."""
    if labels is None:
        return
    _check_tensor("labels", labels)
    _check_integers("labels", labels)
    _check_vector("labels", labels, "a column for each row of the features", x)
    if offset != 0:
        raise ValueError(f"labels take the place of offset, which must be 0, got {offset}")
    if not _is_readable(labels):
        return
    if labels.numel() == 0:
        return
    least, most = labels.aminmax()
    if least < 0 or most >= y.shape[0]:
        raise ValueError(
            f"labels must be columns, 0 <= label < {y.shape[0]}, got {int(least)} to {int(most)}"
        )
    if ids is not None and (wrong := (ids[0] != ids[1][labels.long()]).nonzero()).numel():
        row = int(wrong[0])
        raise ValueError(
            "a row and the key of its label must have one id, got "
            f"{int(ids[0][row])} and {int(ids[1][labels[row]])} in row {row}"
        )


def _is_readable(values: Tensor) -> bool:
    """True if values can be read without waiting for a device."""
    # A fake tensor is a subclass.
    return values.device.type == "cpu" and not is_traced() and type(values) is Tensor


def _check_one_set(
    offset: int | None, labels: Tensor | None, margin: Tensor | float | None,
    key_bias: Tensor | None, rows: bool,
) -> None:  # fmt: skip
    """Checks the options of a block of one set of features against itself."""
    absent = {"labels": labels, "false_negative_margin": margin, "key_bias": key_bias}
    for name, value in absent.items():
        if value is not None:
            raise ValueError(f"{name} must be None without y: no row has a positive of its own")
    if offset != 0 or not rows:
        raise ValueError(
            "without y the own pairs are left out and only rows are returned: offset must be 0 and "
            f"rows True, got {offset} and {rows}"
        )


def _check_ids_of_one_set(ids: tuple[Tensor, Tensor] | None) -> None:
    """Values are checked on CPUs only, as for labels."""
    if ids is None or ids[0] is ids[1] or not _is_readable(ids[0]):
        return
    if not torch.equal(*ids):
        raise ValueError("without y ids must be one tensor, got two that differ")


def check_contrast(
    x: Tensor, y: Tensor | None, logit_scale: Tensor | float, logit_bias: Tensor | float | None,
    key_bias: Tensor | None, ids: tuple[Tensor, Tensor] | Tensor | None,
    margin: Tensor | float | None, labels: Tensor | None, *, offset: int | None, same_id: str,
    rows: bool, columns: bool, kind: str, may_be_empty: bool = False,
) -> tuple[
    Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None, Tensor | None
]:  # fmt: skip
    """Checks the arguments of `contrast`, except backend and memory_budget; returns y, scale, bias,
    ids and margin."""
    check_offset(offset)
    of_itself = y is None
    if of_itself:
        _check_one_set(offset, labels, margin, key_bias, rows)
        # An autograd Function needs distinct tensor objects; all of the gradient is x's.
        y = x.detach() if isinstance(x, Tensor) else x
        ids = (ids, ids) if isinstance(ids, Tensor) else ids
    elif y is x:
        y = y.view_as(y)
    check_sides(x, y, may_be_empty)
    ids = check_ids(ids, same_id, x, y)
    if of_itself:
        _check_ids_of_one_set(ids)
    check_labels(labels, ids, offset, x, y)
    check_key_bias(key_bias, y)
    kind_of(kind)
    if not (rows or columns):
        raise ValueError("rows or columns must be wanted, got rows=False, columns=False")
    scale = scalar("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else scalar("logit_bias", logit_bias, x)
    if margin is not None:
        margin = scalar("false_negative_margin", margin, x).detach()
    refuse_forward_mode(x, y, scale, bias, key_bias)
    return y, scale, bias, ids, margin


def scalar(name: str, value: Tensor | float, features: Tensor) -> Tensor:
    """Returns a scalar argument, such as logit_scale, as a tensor of one element on the features'
    device."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        dtype = torch.float64 if features.device.type != "mps" else torch.float32
        return torch.full((), float(value), dtype=dtype, device=features.device)
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor()")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
    if value.device != features.device:
        if value.dim() == 0 and value.device.type == "cpu":
            return value.to(features.device, non_blocking=True)  # as in torch's own operators
        raise ValueError(
            f"{name} must be on the features' device {features.device}, got {value.device}"
        )
    return value


def budget_of(memory_budget: int | None, device: torch.device) -> int:
    """Returns the bytes in which products or weights may be kept for the backward."""
    if memory_budget is None:
        return DEFAULT_BUDGETS.get(device.type, 0)
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 0:
        raise ValueError(f"memory_budget must be a number of bytes >= 0, got {memory_budget!r}")
    return memory_budget


def check_live(live: tuple[int, int] | None, pairs: int) -> tuple[int, int] | None:
    """Returns live as two ints; raises ValueError unless they lie within the pairs."""
    if live is None:
        return None
    try:
        start, stop = map(operator.index, live)
    except (TypeError, ValueError):
        start = stop = -1
    if not 0 <= start < stop <= pairs:
        raise ValueError(
            f"live must be (start, stop) with 0 <= start < stop <= {pairs} pairs, got {live!r}"
        )
    return start, stop
