"""The warning of a loss whose negatives stay on its rank although there are other ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..engine.compile_marks import constant_in_graphs
from ..engine.warn_once import warn_once
from .agreement import group_named, is_initialized


def warn_of_local_negatives(name: str, process_group: dist.ProcessGroup | None) -> None:
    """Warns once per process if the group, or without one the default group, has several ranks.
    Graphs may call it, too."""
    group = "" if process_group is None else process_group.group_name
    if torch.compiler.is_compiling():
        _warn_while_compiling(name, group)
    else:
        _warn(name, group)


def _warn(name: str, group: str) -> None:
    ranks = dist.get_world_size(group_named(group)) if is_initialized() else 1
    if ranks > 1:
        warn_once(
            "local negatives",
            f"{name} with world_size=1 takes negatives from this rank alone, although its group "
            f"has {ranks} ranks: pass rank and world_size (those of dist.get_rank() and "
            "dist.get_world_size()) to share the batch",
        )


# A graph cannot hold a warning.
@constant_in_graphs
def _warn_while_compiling(name: str, group: str) -> None:
    _warn(name, group)
