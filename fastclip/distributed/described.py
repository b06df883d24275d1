"""A loss's name with its options as text, and the error of ranks whose texts differ.

Ranks compare a code of the text at every call. The text itself travels only if the codes differ.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import gather_rows

_BYTES = 1024  # of a text; all ranks send as many


def described(name: str, **options: Any) -> str:
    """Returns a loss's name with its options, as ranks compare them; of tensors, only that they are
    given."""

    def as_text(value: Any) -> str:
        if isinstance(value, (Tensor, tuple, list)):
            return "given"
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return repr(float(value)) if is_number else repr(value)  # 0 and 0.0 are one margin

    return f"{name}({', '.join(f'{key}={as_text(value)}' for key, value in options.items())})"


def exchange_texts(group: dist.ProcessGroup, text: str, device: torch.device) -> list[str]:
    """Returns the ranks' texts."""
    own = text.encode()[:_BYTES].ljust(_BYTES, b"\0")
    message = torch.tensor(list(own), dtype=torch.uint8, device=device)
    ranks = dist.get_world_size(group)
    received = gather_rows(message, (_BYTES,) * ranks, group).view(ranks, -1).tolist()
    return [bytes(one).rstrip(b"\0").decode(errors="replace") for one in received]


def difference(texts: list[str]) -> str:
    """The error of ranks whose texts differ: it names each option that differs, by rank."""
    names, options = zip(*map(_parsed, texts), strict=True)
    if len(set(names)) > 1:
        return f"all ranks must call one loss, got {by_rank(names)}"
    found = []
    for option in dict.fromkeys(key for one in options for key in one):
        values = [one.get(option, "absent") for one in options]
        if len(set(values)) > 1:
            found.append(f"one {option}, got {by_rank(values)}")
    return f"all ranks must have {'; '.join(found) or f'one call, got {by_rank(texts)}'}"


def by_rank(values: Any) -> str:
    return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))


def _parsed(text: str) -> tuple[str, dict[str, str]]:
    name, _, options = text.partition("(")
    pairs = (option.partition("=") for option in options.rstrip(")").split(", ") if option)
    return name, {key: value for key, _, value in pairs}
