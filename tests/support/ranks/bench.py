"""Functions that ranks run in `test_bench_distributed.py`: exchanges to count, and a tiny case."""

import torch
import torch.distributed as dist
from support.bench import importing  # noqa: F401 -- makes `bench` importable

from bench.cases import make_inputs
from bench.distributed import rank as bench_rank
from bench.distributed.cases import Case, own_inputs
from bench.measure.traffic import Traffic


def counted(rank: int, world_size: int) -> dict[str, dict[str, int]]:
    """The bytes that this rank sends in each exchange of 240 bytes a rank, by kind."""
    x, other = torch.ones(60), (rank + 1) % world_size
    every = torch.empty(world_size * 60)
    parts = [torch.empty(60) for _ in range(world_size)]
    third = torch.empty(60 // world_size)

    def hop() -> None:
        operations = [
            dist.P2POp(dist.isend, x, other),
            dist.P2POp(dist.irecv, parts[0], (rank - 1) % world_size),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def differentiably() -> None:
        """An all-gather as open_clip does it, forward and backward."""
        y = torch.ones(60, requires_grad=True)
        torch.cat(torch.distributed.nn.all_gather(y)).sum().backward()
        assert y.grad.eq(world_size).all()

    runs = {
        "all_gather": lambda: dist.all_gather(parts, x),
        "into one tensor": lambda: dist.all_gather_into_tensor(every, x),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(third, x),
        "reduce_scatter of a list": lambda: dist.reduce_scatter(
            third, list(torch.ones(60).chunk(world_size))
        ),
        "all_reduce": lambda: dist.all_reduce(torch.ones(60)),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(60), x),
        "broadcast": lambda: dist.broadcast(torch.ones(60), 1),
        "hop": hop,
        "differentiable": differentiably,
    }
    found = {}
    for name, run in runs.items():
        with Traffic() as traffic:
            run()
            dist.barrier()
        found[name] = dict(traffic.sent)
    return found


def measured(rank: int, world_size: int, case: Case, *methods: str) -> bench_rank.Measured:
    return bench_rank.measure(rank, world_size, case, methods, seconds=0.05)


def with_a_wrong_rank(rank: int, world_size: int, case: Case) -> dict[str, tuple[float, float]]:
    whole = make_inputs(case.whole)
    inputs = own_inputs(case, rank, whole)
    loss, dx, *others = bench_rank.step_of(case, "fastclip", rank, world_size, inputs)()
    if rank == 1:
        dx = 0.9 * dx
    return bench_rank.errors(case, rank, world_size, whole, {"fastclip": (loss, dx, *others)})
