"""The ranks that make a cached step together: an error of one is an error of all.

A rank that raised alone would leave the others waiting in the loss or in the exchange of gradients
until the timeout of their group.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..distributed.agreement import REFUSED, exchange, has_cpu, is_initialized, refusals
from ..distributed.described import by_rank
from ..engine.namespace import PACKAGE
from ..engine.warn_once import warn_once
from .comparison import Comparison
from .wrappers import groups_of, in_step

Result = TypeVar("Result")


class StepRanks:
    """The groups in which ranks compare; a rank that is in several of them passes on what it hears.

    These are the groups of DDP or FSDP; without them that of the loss, if it is a module or a
    function of fastclip across ranks; else all ranks, if the caller's own `backward` exchanges
    gradients.
    """

    def __init__(self, wrappers: list[nn.Module], loss: Any, has_backward: bool) -> None:
        self.groups: list[dist.ProcessGroup] = []
        self.in_step = any(map(in_step, wrappers))
        if not is_initialized():
            return
        found = [group for wrapper in wrappers for group in groups_of(wrapper)]
        if not found:
            found = _groups_of_loss(loss) or ([dist.group.WORLD] if has_backward else [])
        self.groups = [g for g in dict.fromkeys(found) if dist.get_world_size(g) > 1]

    def check(
        self,
        what: str,
        check: Callable[[], Result],
        compared: Callable[[Result], dict[str, int]] | None = None,
    ) -> Result:
        """Calls a check and returns its result. Raises its error; on other ranks, an error that
        names the rank. compared: numbers that must be the same on all ranks.

        In groups that only move GPU tensors, reading the other ranks' answers would wait for the
        device, so that they do not hear of an error.
        """
        before = {group: refusals(group) for group in self.groups}
        try:
            result = check()
        except Exception:
            # The loss may have told the ranks of its group itself.
            unaware = [group for group, count in before.items() if refusals(group) == count]
            with suppress(Exception):  # a group that is broken must not hide why
                _heard(unaware, (REFUSED,))
            raise
        mine = {} if compared is None else compared(result)
        for heard in _heard(self.groups, (0, *mine.values())):
            refused = [str(rank) for rank, value in enumerate(heard[0]) if value == REFUSED]
            if refused:
                raise ValueError(
                    f"cached_step: all ranks must have {what}, got an error on rank "
                    f"{', '.join(refused)}: that error says why"
                )
            for name, values in zip(mine, heard[1:], strict=True):
                if len(set(values)) > 1:
                    raise ValueError(
                        f"cached_step: all ranks must have the same {name}, got {by_rank(values)}"
                    )
        return result

    def check_equal(self, comparison: Comparison) -> None:
        """Raises if the encodings differ, on this rank or another one."""
        excess = comparison.largest_excess()
        for group in self.groups:
            dist.all_reduce(excess, dist.ReduceOp.MAX, group=group)
        if excess > 1:
            raise RuntimeError(comparison.error())


def _heard(
    groups: list[dist.ProcessGroup], numbers: tuple[int, ...]
) -> list[list[tuple[int, ...]]]:
    """Returns the ranks' values of each number, in each group. A rank that hears REFUSED passes it
    on.

    The message is that of `agree`: a rank that waits there, in its loss, understands REFUSED.
    """
    heard = []
    for group in groups:
        if has_cpu(group):
            heard.append(exchange(group, numbers, torch.device("cpu")))
            if REFUSED in heard[-1][0]:
                numbers = (REFUSED, *numbers[1:])
    return heard


def _groups_of_loss(loss: Any) -> list[dist.ProcessGroup]:
    """Returns the group of a loss across ranks, if it is one of fastclip's."""
    options = loss.keywords if isinstance(loss, functools.partial) else {}
    function = loss.func if isinstance(loss, functools.partial) else loss
    if isinstance(function, nn.Module):
        across = getattr(function, "across_ranks", getattr(function, "world_size", 1) > 1)
        group = getattr(function, "process_group", None)
    else:
        module = getattr(inspect.unwrap(function), "__module__", None) or ""
        across = module.startswith(f"{PACKAGE}.distributed")
        group = options.get("process_group")
    return [dist.group.WORLD if group is None else group] if across else []


def warn_of_separate_gradients() -> None:
    """Warns, once, in a group of several ranks."""
    if is_initialized() and dist.get_world_size() > 1:
        warn_once(
            "gradients of a cached step",
            f"cached_step runs in a group of {dist.get_world_size()} ranks, and its model is "
            "neither DDP nor FSDP, so that each rank keeps gradients of its own: pass the wrapped "
            "model instead of a module inside it, or backward=, such as Lightning's "
            "manual_backward",
        )
