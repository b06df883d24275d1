"""A model as towers: what is called with each micro-batch, and what the batch's outputs are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .inputs import is_rows, rows_of, sizes_of, tensors_of
from .outputs import FEATURES, Outputs, features_of_tower, leaf, outputs_of_model, whole_batch
from .wrappers import modules_of, wrappers_of

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


class Tower(NamedTuple):
    model: Callable[..., Any]
    sizes: list[int]  # the rows of each micro-batch
    arguments: Arguments  # those of the batch
    read: Callable[[Any, Any, int], Outputs]
    outputs: Any
    wrappers: list[nn.Module]

    def encode(self, micro_batch: int) -> Outputs:
        rows, (positional, by_name) = self.rows(micro_batch), self.arguments
        positional = [rows_of(value, rows) for value in positional]
        by_name = {name: rows_of(value, rows) for name, value in by_name.items()}
        return self.read(self.model(*positional, **by_name), self.outputs, self.sizes[micro_batch])

    def rows(self, micro_batch: int) -> slice:
        start = sum(self.sizes[:micro_batch])
        return slice(start, start + self.sizes[micro_batch])

    @property
    def is_frozen(self) -> bool:
        """True if the tower surely has nothing to differentiate."""
        if not isinstance(self.model, nn.Module):
            return False
        tensors = [*self.model.parameters(), *tensors_of(self.arguments)]
        return not any(t.requires_grad for t in tensors)


class Towers(NamedTuple):
    """One model, or two towers with values that they share."""

    parts: tuple[Tower, ...]
    shared: Any
    is_pair: bool

    @property
    def micro_batches(self) -> int:
        return sum(len(tower.sizes) for tower in self.parts)

    def devices(self) -> list[torch.device]:
        """Returns the devices besides the CPU that may draw random numbers; a model may move its
        inputs."""
        found = {x.device for tower in self.parts for x in tensors_of(tower.arguments)}
        found |= {t.device for t in self.parameters()}
        found |= {b.device for module in self._modules() for b in module.buffers()}
        if torch.cuda.is_initialized():
            found.add(torch.device("cuda", torch.cuda.current_device()))
        return [device for device in found if device.type not in ("cpu", "meta")]

    def parameters(self) -> list[Tensor]:
        return [p for module in self._modules() for p in module.parameters()]

    def _modules(self) -> list[nn.Module]:
        return [module for tower in self.parts for module in modules_of(tower.model)]

    def whole(self, encoded: list[list[Outputs]], differentiable: bool) -> Outputs:
        """Returns the batch's outputs from those of the towers' micro-batches."""
        if not self.is_pair:
            return whole_batch(encoded[0], differentiable)
        features = tuple(
            whole_batch(parts, differentiable and not tower.is_frozen).values[0]
            for parts, tower in zip(encoded, self.parts, strict=True)
        )
        shared, names = _values_of(self.shared)
        values = tuple(leaf(s) if differentiable else s for s in shared)
        return Outputs((*features, *values), None if names is None else (*FEATURES, *names))

    def shared_values(self) -> tuple[Any, ...]:
        return _values_of(self.shared)[0]


def towers_of(
    model: Any, inputs: tuple[Any, ...], by_name: Mapping[str, Any], micro_batch: Any,
    outputs: Any, shared: Any,
) -> Towers:  # fmt: skip
    """Checks `cached_step`'s arguments and returns the towers that they describe."""
    if not isinstance(model, (tuple, list)):
        if shared is not None:
            raise ValueError(
                "shared must be None for one model, which returns what its pairs share, got "
                f"{type(shared).__name__}"
            )
        arguments = inputs, by_name
        sizes = sizes_of({**dict(enumerate(inputs)), **by_name}, micro_batch, "inputs")
        tower = Tower(model, sizes, arguments, outputs_of_model, outputs, wrappers_of(model))
        return Towers((tower,), None, False)
    if len(model) != 2 or len(inputs) != 2 or by_name:
        raise ValueError(
            "two towers must have two inputs, one each, and none by name, got "
            f"{len(model)} towers, {len(inputs)} inputs and {len(by_name)} by name"
        )
    micro_batches = micro_batch if isinstance(micro_batch, (tuple, list)) else [micro_batch] * 2
    read = outputs if isinstance(outputs, (tuple, list)) else [outputs] * 2
    for name, value in (("micro_batch", micro_batches), ("outputs", read)):
        if len(value) != 2:
            raise ValueError(f"{name} must be one value or a pair for two towers, got {len(value)}")
    if isinstance(outputs, Mapping):
        raise ValueError(
            "outputs must be a key, a function or a pair of them for two towers, got a dictionary"
        )
    parts = []
    for index, (tower, own) in enumerate(zip(model, inputs, strict=True)):
        sizes = sizes_of(own, micro_batches[index], f"inputs[{index}]")
        parts.append(
            Tower(
                tower, sizes, _arguments(own), features_of_tower, read[index], wrappers_of(tower)
            )
        )  # fmt: skip
    _values_of(shared)
    return Towers(tuple(parts), shared, True)


def _arguments(own: Any) -> Arguments:
    """Returns how a tower is called: a tuple has its arguments, a mapping those by name."""
    if isinstance(own, Mapping):
        return (), own
    is_one = is_rows(own) or not isinstance(own, tuple)
    return ((own,) if is_one else own), {}


def _values_of(shared: Any) -> tuple[tuple[Any, ...], tuple[str, ...] | None]:
    """Returns the values that both towers share, and their names if they have any."""
    if isinstance(shared, Mapping):
        values, names = tuple(shared.values()), tuple(shared)
    elif isinstance(shared, (tuple, list)):
        values, names = tuple(shared), None
    else:
        values, names = (() if shared is None else (shared,)), None
    for value in values:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                "shared must have one number each, such as logit_scale, got shape "
                f"{tuple(value.shape)}"
            )
    return values, names
