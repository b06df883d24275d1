"""Modules that hold a process group: copies share it, and pickling refuses it."""

from __future__ import annotations

import copy
from typing import Any

import torch.distributed as dist
from torch import nn


class HoldsGroup(nn.Module):
    """A module with a `process_group`, or None.

    `copy.copy` and `copy.deepcopy` work, and a copy has the same group. Pickling a module with a
    group raises TypeError, since a group belongs to its process.
    """

    process_group: dist.ProcessGroup | None

    def __copy__(self) -> Any:
        new = type(self).__new__(type(self))
        new.__setstate__(super().__getstate__())
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = new = type(self).__new__(type(self))
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        new.__setstate__(copy.deepcopy(super().__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Called by pickle, and so by torch.save."""
        if self.process_group is not None:
            raise TypeError(
                f"{type(self).__name__} must have process_group=None to be pickled, got a group, "
                "which belongs to its process: set loss.process_group to None before, and to a "
                "group of the loading process afterwards, or save state_dict()"
            )
        return super().__getstate__()
