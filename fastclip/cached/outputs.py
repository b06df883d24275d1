"""The outputs of a model for a micro-batch and for the batch.

A tensor of two and more dimensions has a row for each pair: features, a teacher's features,
captions. A tensor with a single number, such as `logit_scale`, and any other object belong to the
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

FEATURES = ("image_features", "text_features")


class Outputs(NamedTuple):
    values: tuple[Any, ...]
    names: tuple[str, ...] | None  # the keywords of the loss; None: its positional arguments

    def name_of(self, index: int) -> str:
        return f"output {index}" if self.names is None else self.names[index]

    def has_rows(self, index: int) -> bool:
        value = self.values[index]
        return isinstance(value, Tensor) and value.dim() > 1

    def shapes(self) -> list[tuple[int, ...] | None]:
        """Returns the shapes of tensors, None for other outputs."""
        return [tuple(v.shape) if isinstance(v, Tensor) else None for v in self.values]

    def of_rows(self, rows: slice) -> Outputs:
        """Returns the outputs of some of the batch's rows."""
        return self._replace(
            values=tuple(
                value[rows] if self.has_rows(index) else value
                for index, value in enumerate(self.values)
            )
        )

    def of_loss(self, loss: Callable[..., Any]) -> Tensor:
        """Returns the loss of these outputs."""
        if self.names is None:
            value = loss(*self.values)
        else:
            value = loss(**dict(zip(self.names, self.values, strict=True)))
        if isinstance(value, Mapping):
            value = sum(value.values())
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise ValueError(f"the loss must return one number or a dictionary of them, got {got}")
        return value.reshape(())


def outputs_of_model(returned: Any, outputs: Any, rows: int) -> Outputs:
    """Returns the outputs of a model for `rows` pairs. outputs: `cached_step`'s argument."""
    if callable(outputs):
        returned = outputs(returned)
    elif outputs is not None:
        returned = {name: _entry(returned, key) for name, key in outputs.items()}
    if isinstance(returned, Mapping):
        if outputs is None and not all(name in returned for name in FEATURES):
            raise ValueError(
                f"the model must return {' and '.join(FEATURES)}, or outputs= must say which "
                f"entries they are, got {_described(returned)}"
            )
        found = Outputs(tuple(returned.values()), tuple(returned))
    elif isinstance(returned, Tensor):
        found = Outputs((returned,), None)
    elif isinstance(returned, (tuple, list)):
        found = Outputs(tuple(returned), None)
    else:
        raise ValueError(
            "the model must return a tensor, a tuple or a dictionary, or outputs= must make one of "
            f"its result, got {_described(returned)}"
        )
    _check(found, rows)
    return found


def features_of_tower(returned: Any, outputs: Any, rows: int) -> Outputs:
    """Returns the features that one of two towers makes of `rows` rows."""
    if callable(outputs):
        returned = outputs(returned)
    elif outputs is not None:
        returned = _entry(returned, outputs)
    if not isinstance(returned, Tensor) or returned.dim() < 2:
        raise ValueError(
            "each of two towers must return features (m, D), or outputs= must say which "
            f"entries they are, got {_described(returned)}"
        )
    found = Outputs((returned,), None)
    _check(found, rows)
    return found


def whole_batch(parts: list[Outputs], differentiable: bool) -> Outputs:
    """Returns the outputs of a batch from those of its micro-batches, as leaves of a new graph if
    `differentiable`. What belongs to the batch is that of the first micro-batch."""
    first = parts[0]
    if any(p.names != first.names or len(p.values) != len(first.values) for p in parts):
        raise ValueError("the model must return the same entries for every micro-batch, got others")
    values = []
    for index, value in enumerate(first.values):
        if first.has_rows(index):
            value = torch.cat([p.values[index] for p in parts])
        values.append(leaf(value) if differentiable else value)
    return first._replace(values=tuple(values))


def leaf(value: Any) -> Any:
    """Returns a tensor without its graph, differentiable if it is floating."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.is_floating_point())


def _entry(returned: Any, key: str | int) -> Any:
    if isinstance(key, str) and not isinstance(returned, Mapping):
        found = getattr(returned, key, None)
    elif isinstance(returned, (Mapping, tuple, list)):
        found = returned[key] if _has(returned, key) else None
    else:
        found = None
    if found is None:
        raise ValueError(
            f"outputs= must name entries that the model returns, got {key!r}, which is not in "
            f"{_described(returned)}"
        )
    return found


def _has(returned: Any, key: Any) -> bool:
    return key in returned if isinstance(returned, Mapping) else -1 < key < len(returned)


def _check(found: Outputs, rows: int) -> None:
    if not any(map(found.has_rows, range(len(found.values)))):
        raise ValueError(f"the model must return features (m, D), got {_described(found.values)}")
    for index, value in enumerate(found.values):
        name = found.name_of(index)
        if found.has_rows(index) and value.shape[0] != rows:
            raise ValueError(
                f"the model must return a row for each of the {rows} rows of a micro-batch, got "
                f"{name} of shape {tuple(value.shape)}"
            )
        if isinstance(value, Tensor) and value.dim() < 2 and value.numel() != 1:
            raise ValueError(
                "the model's outputs must be (m, D), or one number such as logit_scale, got "
                f"{name} of shape {tuple(value.shape)}"
            )
        if isinstance(value, (Mapping, list, tuple)):
            raise ValueError(
                f"the model's outputs must not be nested, got {name}, {_described(value)}: "
                "outputs= may choose the entries that the loss needs"
            )


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {', '.join(map(str, value)) or 'no entries'}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(map(_described, value)) or 'nothing'}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__
