"""The processes that train together under torchrun.

All ranks draw the same batches, each prepares only its own slice of pictures and tokens, and DDP
averages the gradients. The curve is that of one process up to rounding. Without torchrun there is
no process group and no DDP.
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
    local_rank: int = 0  # the rank within its machine
    local_size: int = 1  # the ranks of its machine
    restarts: int = 0  # by torchrun
    under_torchrun: bool = False

    @classmethod
    def launched(cls) -> Workers:
        """The workers as torchrun started them; one alone without torchrun."""
        if not (dist.is_available() and dist.is_torchelastic_launched()):
            return cls()
        names = (
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT",
        )  # fmt: skip
        return cls(*(int(os.environ[name]) for name in names), under_torchrun=True)

    @property
    def first(self) -> bool:
        """True for the worker that prints, evaluates and writes."""
        return self.rank == 0

    def sizes(self, batch_size: int) -> list[int]:
        """The number of pairs of each rank; they differ by at most one.

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
        """The slice of this rank's pairs."""
        ends = list(itertools.accumulate(self.sizes(batch_size), initial=0))
        return slice(ends[self.rank], ends[self.rank + 1])

    def device(self, text: str) -> str:
        """This rank's device: with "cuda" each rank has a GPU of its own.

        Raises:
            ValueError: a device that ranks cannot share, or too few GPUs.
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
            # torchrun's store survives a restart with the addresses of dead processes, and gloo
            # would connect to these (pytorch/pytorch#135712). With several machines their counts of
            # restarts may differ.
            store, rank, size = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(f"restart {self.restarts}", store)
            options = {"store": store, "rank": rank, "world_size": size}
        dist.init_process_group(backend, **options)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def from_first(self, make: Callable[[], T]) -> T:
        """Returns rank 0's `make()` on all ranks, or raises its ValueError or OSError there."""
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

    def wrap(self, model: CLIP) -> Callable[..., dict[str, Tensor]]:
        """The model in DDP, unless this worker is alone."""
        if self.size == 1:
            return model
        wrapped = DistributedDataParallel(model)
        # DDP orders its buckets by the gradients of its first backward, and from three ranks on the
        # order of a sum depends on the bucket. A backward of one pair, without a step, comes first,
        # so that a step has the same bits in a run and in a resumed run.
        side, length = model.config.image_size, model.config.context_length
        device = model.logit_scale.device
        tokens = torch.zeros(1, length, dtype=torch.long, device=device)
        outputs = wrapped(torch.zeros(1, 3, side, side, device=device), tokens)
        sum(output.sum() for output in outputs.values()).backward()
        return wrapped

    def account(self, value: Tensor, asked: bool) -> tuple[float, bool]:
        """The whole batch's loss, and True if any rank was asked to stop; all stop together."""
        if self.size == 1:
            return value.item(), asked
        both = torch.stack([value.detach(), value.new_tensor(float(asked))])
        dist.all_reduce(both)
        total, asking = both.tolist()
        return total / self.size, asking > 0


ALONE = Workers()


def fused_across(sizes: list[int]) -> Callable[..., Tensor]:
    """The fused loss of a batch with these numbers of pairs on the ranks."""
    return partial(distributed.clip_loss, uneven=len(set(sizes)) > 1)


def dense_across(sizes: list[int]) -> Callable[..., Tensor]:
    """The dense loss: every rank gathers the batch and computes the whole matrix."""
    most = max(sizes)

    def padded(x: Tensor) -> Tensor:  # gathering needs one size
        return F.pad(x, (0, 0, 0, most - len(x)))

    def whole(x: Tensor) -> Tensor:
        return torch.cat([rows[:size] for rows, size in zip(x.split(most), sizes, strict=True)])

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        towers = padded(image_features), padded(text_features)
        gathered = distributed.gather_features(*towers, gather_with_grad=True)
        return dense.clip_loss(*(whole(x) for x in gathered), logit_scale)

    return loss
