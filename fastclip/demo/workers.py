"""The processes that train together under torchrun, as one of them sees them.

All ranks draw the same batches; each makes pictures and tokens of its own slice alone, and DDP
brings the gradients together. Their curve is that of one process, up to rounding. Without torchrun
a worker is alone: no process group, no DDP.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .. import distributed
from .. import reference as dense
from ..clip.model import CLIP

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """One of `size` processes, each with a contiguous slice of every batch."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # within its machine, which has so many:
    local_size: int = 1
    restarts: int = 0  # how often torchrun has started them anew
    under_torchrun: bool = False

    @classmethod
    def launched(cls) -> Workers:
        """As torchrun says."""
        if not (dist.is_available() and dist.is_torchelastic_launched()):
            return cls()
        names = (
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT",
        )  # fmt: skip
        return cls(*(int(os.environ[name]) for name in names), under_torchrun=True)

    @property
    def first(self) -> bool:
        """Whether this one shows, evaluates and writes."""
        return self.rank == 0

    def sizes(self, batch_size: int) -> list[int]:
        """Each rank's pairs; they differ by one where the ranks do not divide the batch.

        Raises:
            ValueError: more ranks than pairs.
        """
        if batch_size < self.size:
            raise ValueError(
                f"batch size must be at least 1 for each of {self.size} ranks, got {batch_size}"
            )
        return [
            batch_size // self.size + (rank < batch_size % self.size) for rank in range(self.size)
        ]

    def rows(self, batch_size: int) -> slice:
        """This rank's pairs."""
        ends = list(itertools.accumulate(self.sizes(batch_size), initial=0))
        return slice(ends[self.rank], ends[self.rank + 1])

    def device(self, text: str) -> str:
        """This rank's device: of GPUs each rank takes its own.

        Raises:
            ValueError: what ranks cannot share.
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
        """A process group, unless this worker is alone."""
        if self.size == 1:
            yield
            return
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        options = {}
        if self.restarts and self.local_size == self.size:
            # torchrun's store outlives a restart, and in it the addresses of the dead, to which
            # gloo connects (pytorch/pytorch#135712). Counts of several machines may differ.
            store, rank, size = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(f"restart {self.restarts}", store)
            options = {"store": store, "rank": rank, "world_size": size}
        dist.init_process_group(backend, **options)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make()` gives on rank 0, or the ValueError or OSError that it raises there."""
        if self.size == 1:
            return make()
        told: list[T | Exception | None] = [None]
        if self.first:
            try:
                told = [make()]
            except (ValueError, OSError) as error:
                told = [error]
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if isinstance(told[0], Exception):
            raise told[0]
        return told[0]

    def wrap(self, model: CLIP) -> Callable[..., dict[str, Tensor]]:
        """The model in DDP, unless this worker is alone."""
        if self.size == 1:
            return model
        wrapped = DistributedDataParallel(model)
        # DDP orders its buckets by the first step's gradients, and three ranks or more add in an
        # order that depends on a gradient's place there. One pair that trains nothing comes before
        # the first step, so that a step is the same, bit for bit, whether training began with it.
        side, length = model.config.image_size, model.config.context_length
        device = model.logit_scale.device
        tokens = torch.zeros(1, length, dtype=torch.long, device=device)
        outputs = wrapped(torch.zeros(1, 3, side, side, device=device), tokens)
        sum(output.sum() for output in outputs.values()).backward()
        return wrapped

    def account(self, value: Tensor, asked: bool) -> tuple[float, bool]:
        """The whole batch's loss, and whether any rank was asked to stop: all stop at one step."""
        if self.size == 1:
            return value.item(), asked
        both = torch.stack([value.detach(), value.new_tensor(float(asked))])
        dist.all_reduce(both)
        total, asking = both.tolist()
        return total / self.size, asking > 0


ALONE = Workers()


def fused_across(sizes: list[int]) -> Callable[..., Tensor]:
    """The fused loss of a batch that ranks have so many pairs of."""
    return partial(distributed.clip_loss, uneven=len(set(sizes)) > 1)


def dense_across(sizes: list[int]) -> Callable[..., Tensor]:
    """The dense loss: every rank gathers the batch and makes the whole matrix."""
    most = max(sizes)

    def padded(x: Tensor) -> Tensor:  # to one size, which the gathering asks for
        return F.pad(x, (0, 0, 0, most - len(x)))

    def whole(x: Tensor) -> Tensor:
        return torch.cat([rows[:size] for rows, size in zip(x.split(most), sizes, strict=True)])

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        towers = padded(image_features), padded(text_features)
        gathered = distributed.gather_features(*towers, gather_with_grad=True)
        return dense.clip_loss(*(whole(x) for x in gathered), logit_scale)

    return loss
