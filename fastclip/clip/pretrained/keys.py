"""Key maps: which keys of a foreign state dict make each parameter of `CLIP`, and their check."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

State = Mapping[str, Tensor]
MOST_NAMES = 20  # names of each sort that one error lists


@dataclass(frozen=True)
class Source:
    """The keys that make one parameter: joined along the first dimension, or transposed.

    `shares` are the parts of the first dimension that each key holds, as whole numbers.
    """

    keys: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    transposed: bool = False

    def shapes(self, wanted: torch.Size) -> list[tuple[int, ...]]:
        """Returns the shape that each key must have to make a parameter of shape `wanted`."""
        if self.transposed:
            return [tuple(reversed(wanted))]
        if len(self.keys) == 1:
            return [tuple(wanted)]
        part = wanted[0] // sum(self.shares)
        return [(part * share, *wanted[1:]) for share in self.shares]


def one(key: str) -> Source:
    return Source((key,))


def joined(*keys: str) -> Source:
    """Returns a source of equal parts."""
    return Source(keys, (1,) * len(keys))


def pair(ours: str, theirs: str | tuple[str, ...]) -> dict[str, Source]:
    """Returns the sources of a weight and a bias; `{}` stands for both words in their keys."""
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return {
        f"{ours}.{word}": joined(*(key.format(word) for key in theirs))
        for word in ("weight", "bias")
    }


def listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + rest


def without_leading_ones(shape: torch.Size, dims: int) -> tuple[int, ...]:
    """Returns the shape without the leading ones that exceed `dims`, as libraries store position
    embeddings and scalars."""
    while len(shape) > dims and shape[0] == 1:
        shape = shape[1:]
    return tuple(shape)


def convert(
    state: State, sources: Mapping[str, Source], wanted: Mapping[str, torch.Size], form: str,
    harmless: Iterable[str], dtype: torch.dtype, device: torch.device | str,
) -> dict[str, Tensor]:  # fmt: skip
    """Returns `CLIP`'s state dict, in memory of its own.

    Args:
        sources: for each parameter of the model, its keys.
        wanted: for each parameter of the model, its shape.
        harmless: patterns of keys that hold no weights and are left out.

    Raises:
        ValueError: a key is missing, unknown, no floating-point tensor, or has another shape; or
            the form has no key for a parameter.
    """
    if strays := [name for name in wanted if name not in sources]:
        raise ValueError(f"{form} has no weights for {listed(strays)}: the options ask for them")
    sources = {name: source for name, source in sources.items() if name in wanted}
    needed = [key for source in sources.values() for key in source.keys]
    missing = [key for key in needed if key not in state]
    known = set(needed)
    patterns = [re.compile(pattern) for pattern in harmless]
    unknown = [
        key for key in state if key not in known and not any(p.fullmatch(key) for p in patterns)
    ]
    wrong = []
    for name, source in sources.items():
        for key, shape in zip(source.keys, source.shapes(wanted[name]), strict=True):
            if key not in state:
                continue
            tensor = state[key]
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                wrong.append(f"{key} must be floating-point, got {kind}")
            elif without_leading_ones(tensor.shape, len(shape)) != shape:
                wrong.append(f"{key} must be {shape}, got {tuple(tensor.shape)}")
    problems = [
        f"{title}: {listed(names)}"
        for title, names in (
            ("missing keys", missing), ("unknown keys", unknown), ("wrong tensors", wrong)
        )
        if names
    ]  # fmt: skip
    if problems:
        raise ValueError(f"these are not the weights of {form}: {'; '.join(problems)}")
    found = {}
    for name, source in sources.items():
        shapes = source.shapes(wanted[name])
        parts = [state[key].detach().reshape(s) for key, s in zip(source.keys, shapes, strict=True)]
        tensor = parts[0].T if source.transposed else torch.cat(parts) if parts[1:] else parts[0]
        found[name] = tensor.to(device, dtype, copy=True).contiguous()
    return found
