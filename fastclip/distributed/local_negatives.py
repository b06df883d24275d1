"""The warning of a loss whose negatives stay on its rank although there are other ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..engine.compile_marks import constant_in_graphs
from ..engine.warn_once import warn_once


def warn_of_local_negatives(name: str) -> None:
    """Warns once per process if the default group has several ranks. A graph may call it, too."""
    if torch.compiler.is_compiling():
        _warn_while_compiling(name)
    else:
        _warn(name)


def _warn(name: str) -> None:
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1:
        warn_once(
            "local negatives",
            f"{name} with world_size=1 takes its negatives from this rank alone, although there "
            f"are {ranks} ranks: pass rank=dist.get_rank() and world_size=dist.get_world_size() "
            "to share the batch",
        )


# A graph cannot hold a warning.
@constant_in_graphs
def _warn_while_compiling(name: str) -> None:
    _warn(name)
