"""Counts the bytes that a rank sends to other ranks, by kind of exchange.

It intercepts c10d's operators. Each function of torch.distributed calls one of them exactly once,
in the forward and in the backward; so do all_gather with a list of tensors and
`torch.distributed.nn`, which open_clip calls. A collective counts as what a bandwidth-optimal ring
over R ranks sends: `(R - 1) / R` of the whole in an all-gather, a reduce-scatter and an all-to-all,
twice that in an all-reduce. A root sends to every other rank. gloo's own algorithms may differ.
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


# For each operator: its kind, the position of the argument with this rank's own data, and the bytes
# sent for it. In a scatter only the root has data.
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
    """`with Traffic() as traffic: ...` counts the bytes that this thread, and backwards started by
    it, send: `traffic.sent`, by kind. An unknown operator raises KeyError."""

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
        exchange, position, rule = _OPERATORS[func._schema.name.removeprefix("c10d::")]
        group = dist.ProcessGroup.unbox(args[names.index("process_group")])
        is_root = "root_rank" in names and args[names.index("root_rank")] == group.rank()
        if sent := round(rule(_bytes(args[position]), group.size(), is_root)):
            self.sent[exchange] += sent


def _bytes(held: Any) -> int:
    if isinstance(held, Tensor):
        return held.numel() * held.element_size()
    return sum(map(_bytes, held)) if isinstance(held, list | tuple) else 0
