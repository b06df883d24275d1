"""One job in this process, which may be a rank of torchrun's."""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.tensor_results import TensorResults

from .jobs import BATCH, arguments


class PairMatrices(TensorResults):
    """Counts the results of operators that have an entry for each pair of a batch."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.sizes = {BATCH * k for k in (1, 2, ranks, 2 * ranks)}
        self.count = 0

    def see(self, tensors: list[torch.Tensor]) -> None:
        self.count += sum(t.dim() == 2 and set(t.shape) <= self.sizes for t in tensors)


@contextmanager
def data_parallel_on_cpus() -> Iterator[None]:
    """open_clip 3.3 gives DDP a CPU in `device_ids`, which torch refuses."""
    wrapper = torch.nn.parallel.DistributedDataParallel
    init = wrapper.__init__

    def without_devices(self: Any, module: Any, device_ids: Any = None, **options: Any) -> None:
        init(self, module, **options)

    wrapper.__init__ = without_devices
    try:
        yield
    finally:
        wrapper.__init__ = init


@contextmanager
def group_of(job: str, rank: int, ranks: int) -> Iterator[None]:
    """A later group of the same processes must not find the first one's addresses."""
    init = dist.init_process_group

    def with_its_own_keys(backend: str, init_method: str) -> None:
        store, *_ = next(dist.rendezvous(init_method))
        init(backend, store=dist.PrefixStore(job, store), rank=rank, world_size=ranks)

    dist.init_process_group = with_its_own_keys
    try:
        yield
    finally:
        dist.init_process_group = init
        if dist.is_initialized():
            dist.destroy_process_group()


def run(folder: Path, arm: str, job: str) -> None:
    """Runs the trainer, and writes the losses and evaluations that it logs, and the number of
    matrices of pairs."""
    from open_clip_train.main import main

    rank, ranks = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    name = f"{job}-{arm}-{ranks}"
    given = [*arguments(job, str(folder), ranks), "--logs", str(folder / "logs"), "--name", name]
    logging.getLogger().handlers.clear()
    matrices = PairMatrices(ranks)
    # A mode would be traced.
    counting = nullcontext() if "--torchcompile" in given else matrices
    with data_parallel_on_cpus(), group_of(name, rank, ranks), counting:
        main(given)
    if rank == 0:
        lines = (folder / "logs" / name / "out.log").read_text().splitlines()
        losses = [
            [float(value) for value in re.findall(r"_loss: (\S+) \(", line)]
            for line in lines
            if "Train Epoch" in line
        ]
        evaluations = [
            {name: float(value) for name, value in re.findall(r"(\S+): ([\d.]+)", line)}
            for line in lines
            if "_mean_rank" in line
        ]
        found = {"losses": losses, "evaluations": evaluations, "matrices": matrices.count}
        (folder / f"{name}.json").write_text(json.dumps(found))
