"""How many bytes a rank sends to others: a context manager that counts them by kind of exchange.

It sees c10d's operators, where every function of torch.distributed ends exactly once, whichever
name it was called by: all_gather's list form and open_clip's `torch.distributed.nn`, in the forward
and in the backward, included. Of collectives it counts what bandwidth-optimal algorithms send, a
ring's (R ranks): `(R - 1) / R` of the whole in an all-gather, a reduce-scatter and an all-to-all,
twice that in an all-reduce; a root sends to each other rank. gloo need not do the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _to_each_other(own: int, ranks: int, is_root: bool) -> float:
    return own * (ranks - 1)


def _but_its_own(own: int, ranks: int, is_root: bool) -> float:
    return own * (ranks - 1) / ranks


def _reduced_and_gathered(own: int, ranks: int, is_root: bool) -> float:
    return 2 * own * (ranks - 1) / ranks


def _of_the_root(own: int, ranks: int, is_root: bool) -> float:
    return own * (ranks - 1) if is_root else 0


def _to_the_root(own: int, ranks: int, is_root: bool) -> float:
    return 0 if is_root else own


def _once(own: int, ranks: int, is_root: bool) -> float:
    return own


def _nothing(own: int, ranks: int, is_root: bool) -> float:
    return 0


# Of each operator: its kind, the argument that holds what this rank brings, and what it sends of
# that. In a scatter only the root brings something.
_OPERATORS: dict[str, tuple[str, int, Callable[[int, int, bool], float]]] = {
    "allgather_": ("all_gather", 1, _to_each_other),
    "_allgather_base_": ("all_gather", 1, _to_each_other),
    "allgather_coalesced_": ("all_gather", 1, _to_each_other),
    "allgather_into_tensor_coalesced_": ("all_gather", 1, _to_each_other),
    "reduce_scatter_": ("reduce_scatter", 1, _but_its_own),
    "_reduce_scatter_base_": ("reduce_scatter", 1, _but_its_own),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, _but_its_own),
    "allreduce_": ("all_reduce", 0, _reduced_and_gathered),
    "allreduce_coalesced_": ("all_reduce", 0, _reduced_and_gathered),
    "alltoall_": ("all_to_all", 1, _but_its_own),
    "alltoall_base_": ("all_to_all", 1, _but_its_own),
    "scatter_": ("scatter", 1, _but_its_own),
    "broadcast_": ("broadcast", 0, _of_the_root),
    "gather_": ("gather", 1, _to_the_root),
    "reduce_": ("reduce", 0, _to_the_root),
    "send": ("send", 0, _once),
    "recv_": ("send", 0, _nothing),
    "recv_any_source_": ("send", 0, _nothing),
    "barrier": ("barrier", 0, _nothing),
    "monitored_barrier_": ("barrier", 0, _nothing),
}


class Traffic(TorchDispatchMode):
    """`with Traffic() as traffic: ...`, then `traffic.sent`: bytes by kind, of this thread and of
    the backwards that it starts. An exchange of a kind that it does not know is a KeyError."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.sent.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        names = [argument.name for argument in func._schema.arguments]
        kind, position, rule = _OPERATORS[func._schema.name.removeprefix("c10d::")]
        group = dist.ProcessGroup.unbox(args[names.index("process_group")])
        is_root = "root_rank" in names and args[names.index("root_rank")] == group.rank()
        if sent := round(rule(_bytes(args[position]), group.size(), is_root)):
            self.sent[kind] += sent


def _bytes(held: Any) -> int:
    if isinstance(held, Tensor):
        return held.numel() * held.element_size()
    return sum(map(_bytes, held)) if isinstance(held, list | tuple) else 0
