"""Checks of the tensors and options that a user passes, and the values that follow from them.

The choice of an engine (`backends.py`) checks the backend. An error states the rule, with what was
expected, and what it got.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .autograd import is_traced
from .dtypes import FLOATING

REDUCTIONS = ("none", "mean", "sum")

# The meanings of equal ids.
SAME_ID = ("ignore", "positive")

# On CPUs a product costs more than the memory traffic of keeping it. On an H100, keeping all
# 65536 x 65536 weights in bf16 takes 8 GiB and saves 5 % of a step.
DEFAULT_BUDGETS = {"cpu": 256 << 20, "cuda": 0}

LARGEST_OFFSET = 1 << 62


def check_features(
    x: Tensor, y: Tensor, may_be_empty: bool = False,
    names: tuple[str, str] = ("image_features", "text_features"),
) -> None:  # fmt: skip
    """Checks two towers' features, paired row by row."""
    for name, features in zip(names, (x, y), strict=True):
        _check_one(name, features, "(N, D)")
    if x.shape != y.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have one shape (N, D), got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    _check_together(names, x, y, may_be_empty)


def check_sides(
    x: Tensor, y: Tensor, may_be_empty: bool = False, names: tuple[str, str] = ("x", "y")
) -> None:
    """Checks the features of rows, x (M, D), and of columns, y (N, D)."""
    _check_one(names[0], x, "(M, D)")
    _check_one(names[1], y, "(N, D)")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{names[0]} (M, D) and {names[1]} (N, D) must have one width D, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    _check_together(names, x, y, may_be_empty)


def _check_one(name: str, features: Tensor, shape: str) -> None:
    check_tensor(name, features)
    if type(features) is not Tensor and type(features).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor: pass {name}.to_local() or "
            f"{name}.full_tensor()"
        )
    check_floating(name, features)
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
        check_tensor(name, own)
        check_integers(name, own)
        check_vector(name, own, "an id for each row of the features", features)
    return ids[0], ids[1]


def check_key_bias(key_bias: Tensor | None, y: Tensor) -> None:
    """Checks a bias for each column."""
    if key_bias is None:
        return
    check_tensor("key_bias", key_bias)
    check_floating("key_bias", key_bias)
    check_vector("key_bias", key_bias, "a bias for each column", y)


def check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_integers(name: str, value: Tensor) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {value.dtype}")


def check_floating(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}")


def check_vector(name: str, vector: Tensor, rule: str, features: Tensor) -> None:
    """Checks that a vector has a number for each of the features, on their device."""
    lines = features.shape[0]
    if vector.shape != (lines,):
        raise ValueError(f"{name} must have {rule}, shape ({lines},), got {tuple(vector.shape)}")
    if vector.device != features.device:
        raise ValueError(
            f"{name} must be on the features' device {features.device}, got {vector.device}"
        )


def is_readable(values: Tensor) -> bool:
    """True if values can be read without waiting for a device."""
    # A fake tensor is a subclass.
    return values.device.type == "cpu" and not is_traced() and type(values) is Tensor


def check_positives(
    x: Tensor, y: Tensor, offset: int | None, same_id: str, names: tuple[str, str]
) -> None:
    """Checks that each row has an own positive, unless ids name the positives."""
    check_sides(x, y, may_be_empty=True, names=names)
    check_offset(offset)
    if offset is None and same_id != "positive":
        raise ValueError("offset must be an int unless same_id='positive', got None")
    if offset is not None and not 0 <= offset <= y.shape[0] - x.shape[0]:
        raise ValueError(
            "each row must have its own positive, 0 <= offset <= N - M, got offset "
            f"{offset}, M {x.shape[0]} and N {y.shape[0]}"
        )


def check_number(
    name: str, value: float, least: float = -math.inf, below: float = math.inf
) -> None:
    """Checks a finite number with least <= number < below."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # Comparisons also work on numbers that a graph takes as inputs; `math.isfinite` does not.
    if not (-math.inf < value < math.inf and least <= value < below):
        raise ValueError(f"{name} must be finite and within [{least}, {below}), got {value}")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


def check_weights(weights: Tensor | None, x: Tensor) -> None:
    """Checks the weights of the losses of rows."""
    if weights is None:
        return
    check_tensor("weights", weights)
    check_floating("weights", weights)
    check_vector("weights", weights, "a weight for each row of the features", x)


def check_offset(offset: int | None) -> None:
    if offset is not None and (isinstance(offset, bool) or not isinstance(offset, int)):
        raise TypeError(f"offset must be an int or None, got {type(offset).__name__}")
    if offset is not None and not -LARGEST_OFFSET <= offset <= LARGEST_OFFSET:
        raise ValueError(f"offset must be within 2^62 of 0, got {offset}")


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
