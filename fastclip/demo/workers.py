"""Training by several processes under torchrun; one process is a worker.

All ranks draw the same batches. Each makes pictures and tokens of its own slice only, and DDP
averages the gradients. The loss curve equals that of one process up to rounding. Without torchrun
there is one worker, with neither a process group nor DDP.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..clip.model import CLIP

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """One of `size` processes. Each has a contiguous slice of every batch."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1  # the number of ranks on this machine
    restarts: int = 0  # by torchrun so far
    under_torchrun: bool = False

    @classmethod
    def launched(cls) -> Workers:
        """Returns this process as torchrun's environment variables describe it."""
        if not (dist.is_available() and dist.is_torchelastic_launched()):
            return cls()
        names = (
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT",
        )  # fmt: skip
        return cls(*(int(os.environ[name]) for name in names), under_torchrun=True)

    @property
    def first(self) -> bool:
        """True on rank 0, which alone prints, evaluates and writes files."""
        return self.rank == 0

    def sizes(self, batch_size: int) -> list[int]:
        """Returns the number of pairs on each rank; any two differ by at most one.

        Raises:
            ValueError: there are more ranks than pairs.
        """
        if batch_size < self.size:
            raise ValueError(
                f"batch size must be at least 1 for each of {self.size} ranks, got {batch_size}"
            )
        return [
            batch_size // self.size + (rank < batch_size % self.size) for rank in range(self.size)
        ]

    def rows(self, batch_size: int) -> slice:
        """Returns this rank's slice of a batch."""
        ends = list(itertools.accumulate(self.sizes(batch_size), initial=0))
        return slice(ends[self.rank], ends[self.rank + 1])

    def device(self, text: str) -> str:
        """Returns this rank's device; with "cuda" each rank has a GPU of its own.

        Raises:
            ValueError: several ranks with a device other than cpu or cuda, or too few GPUs.
        """
        if self.size == 1 or text == "cpu":
            return text
        if text != "cuda":
            raise ValueError(f"device must be cpu or cuda with {self.size} ranks, got {text!r}")
        found = torch.cuda.device_count()
        if found < self.local_size:
            raise ValueError(
                f"device 'cuda' must be a GPU for each of {self.local_size} ranks, got {found}"
            )
        return f"cuda:{self.local_rank}"

    @contextmanager
    def group(self, device: torch.device) -> Iterator[None]:
        """Sets up the process group for the context, unless this worker is alone."""
        if self.size == 1:
            yield
            return
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        options = {}
        if self.restarts and self.local_size == self.size:
            # torchrun's store survives a restart with the addresses of the dead processes, to which
            # gloo would connect (pytorch/pytorch#135712). A prefix hides them. Machines may
            # count restarts differently, so that only ranks of one machine agree on the prefix.
            store, rank, size = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(f"restart {self.restarts}", store)
            options = {"store": store, "rank": rank, "world_size": size}
        dist.init_process_group(backend, **options)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def from_first(self, make: Callable[[], T]) -> T:
        """Returns on every rank the result of `make()` on rank 0, or raises its error there.

        `make` may raise ValueError or OSError only: after another error the other ranks would wait
        for rank 0.
        """
        if self.size == 1:
            return make()
        result: list[T | Exception | None] = [None]
        if self.first:
            try:
                result = [make()]
            except (ValueError, OSError) as error:
                result = [error]
        dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    def wrap(
        self, model: CLIP, towers: nn.Module | None = None
    ) -> Callable[..., dict[str, Tensor]]:
        """Returns `towers` wrapped in DDP, or itself if this worker is alone. `towers` is the
        module to call, around the model; default: the model."""
        towers = model if towers is None else towers
        if self.size == 1:
            return towers
        wrapped = DistributedDataParallel(towers)
        # DDP orders its buckets by the gradients of the first step, and three or more ranks add in
        # an order that depends on a gradient's place in its bucket. A backward pass of one pair,
        # which trains nothing, fixes the order before the first step. Steps are then the same bit
        # for bit, whether or not the training was resumed.
        side, length = model.config.image_size, model.config.context_length
        device = model.logit_scale.device
        tokens = torch.zeros(1, length, dtype=torch.long, device=device)
        outputs = wrapped(torch.zeros(1, 3, side, side, device=device), tokens)
        sum(output.sum() for output in outputs.values()).backward()
        return wrapped

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages over the ranks the gradients of parameters outside of DDP."""
        for parameter in parameters if self.size > 1 else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.size

    def over_all_ranks(self, value: Tensor, stop_requested: bool) -> tuple[float, bool]:
        """Returns the loss of the whole batch, and whether a stop was requested on any rank."""
        if self.size == 1:
            return value.item(), stop_requested
        both = torch.stack([value.detach(), value.new_tensor(float(stop_requested))])
        dist.all_reduce(both)
        total, requests = both.tolist()
        return total / self.size, requests > 0


ALONE = Workers()
