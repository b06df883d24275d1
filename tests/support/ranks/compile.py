"""Compiled calls for `test_compile_ranks.py`, each compared with the same call in eager mode.

Worlds of two ranks are groups within a pool of three.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from support.ranks.contrast import WIDTH, group_of
from support.ranks.failures import error_of
from support.ranks.training import Towers, data, gradients_of_one_process, own, worst
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastclip import distributed
from fastclip.loss import ClipLoss, SigLipLoss


class Case(NamedTuple):
    """A call that ranks compile."""

    name: str  # a function of `distributed`, or a class of `loss`
    options: dict[str, Any]
    ranks: int = 2
    sizes: tuple[int, ...] = (5, 8)
    frozen: tuple[tuple[int, str], ...] = ()  # on single ranks
    ids: bool = False
    key_bias: bool = False
    wider: int = 0  # the number of columns minus that of rows
    dtype: torch.dtype = torch.float32
    backend: str = "aot_eager"
    labels: bool = False
    one_set: bool = False


INPUTS = ("x", "y", "scale", "bias", "key_bias")


def inputs_of(case: Case, n: int, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 * n + rank)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, y = (random(k, WIDTH).to(case.dtype) for k in (n, n + case.wider))
    scalars = torch.tensor(2.0), torch.tensor(-0.7)
    key_bias = random(n + case.wider).double()
    return [
        t.requires_grad_((rank, name) not in case.frozen)
        for name, t in zip(INPUTS, (x, y, *scalars, key_bias), strict=True)
    ]


def loss_of(case: Case, rank: int) -> Callable[..., Tensor]:
    """A function of all inputs. Classes hold the group as an attribute; functions take it."""
    group = None if case.ranks == dist.get_world_size() else group_of(case.ranks)
    if case.name in ("ClipLoss", "SigLipLoss"):
        loss_class = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[case.name]
        module = loss_class(rank=rank, world_size=case.ranks, process_group=group, **case.options)
        return lambda x, y, scale, bias, key_bias: module(x, y, scale, bias)
    call = functools.partial(
        getattr(distributed, case.name), process_group=group, **(case.options or {})
    )
    if case.name != "contrast":
        return lambda x, y, scale, bias, key_bias: call(x, y, scale, bias)

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, key_bias: Tensor) -> Tensor:
        ids = tuple(torch.arange(len(t)) % 3 for t in (x, y)) if case.ids else None
        labels = torch.arange(len(x)) * 2 % len(y) if case.labels else None
        if ids is not None and case.labels:
            ids = ids[1][labels], ids[1]
        found = call(
            x, None if case.one_set else y, scale, bias, labels=labels,
            ids=ids[0] if ids is not None and case.one_set else ids,
            key_bias=key_bias if case.key_bias else None,
        )  # fmt: skip
        # Leaves out the positives, so that their upstream gradient is None.
        used = [t for name, t in found._asdict().items() if t is not None and name != "positives"]
        return sum((t * t).mean() for t in used)

    return loss


def results(loss: Callable[..., Tensor], inputs: list[Tensor], upstream: float) -> list[Tensor]:
    value = loss(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    return [value.detach(), *torch.autograd.grad(value * upstream, wanted, allow_unused=True)]


def compiled(rank: int, world_size: int, cases: list[Case]) -> list[tuple[list[int], float] | None]:
    """For each case the number of graphs after each size, and the largest error against eager
    mode; None for a case without this rank."""
    found: list[tuple[list[int], float] | None] = []
    for case in cases:
        loss = loss_of(case, rank) if rank < case.ranks else group_of(case.ranks)
        if rank >= case.ranks:
            found.append(None)
            continue
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(case.backend)
        varies = len(case.sizes) > 1
        fast = torch.compile(loss, backend=counter, fullgraph=True, dynamic=varies)
        graphs, mistakes = [], [0.0]
        for n in case.sizes:
            inputs = inputs_of(case, n, rank)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                eager, ours = (results(f, inputs, 1.0 - 3 * rank) for f in (loss, fast))
            graphs.append(counter.frame_count)
            for one, other in zip(ours, eager, strict=True):
                assert (one is None) == (other is None), case
                if one is not None:
                    assert one.dtype == other.dtype and one.shape == other.shape, case
                    limit = other.double().norm().clamp_min(1e-6)
                    mistakes.append(float((one.double() - other.double()).norm() / limit))
        found.append((graphs, max(mistakes)))
    return found


def without_gradients(rank: int, world_size: int) -> tuple[float, float]:
    case = Case("siglip_loss", {}, ranks=world_size)
    loss, inputs = loss_of(case, rank), inputs_of(case, 6, rank)
    with torch.no_grad():
        fast = torch.compile(loss, backend="aot_eager", fullgraph=True)
        return float(fast(*inputs)), float(loss(*inputs))


def errors(rank: int, world_size: int, by_rank: list[tuple[str, dict[str, Any]]]) -> tuple:
    """The errors of this rank's call, compiled and in eager mode."""
    name, own_options = by_rank[rank]
    options = dict(own_options)
    m, n, width = options.pop("m", 4), options.pop("n", 4), options.pop("width", 6)
    x, y = torch.ones(m, width, requires_grad=True), torch.ones(n, width, requires_grad=True)
    scale = options.pop("scale", 2.0)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        found = getattr(distributed, name)(x, y, scale, **options)
        return found if isinstance(found, Tensor) else found.rows.sum()

    torch._dynamo.reset()
    fast = torch.compile(loss, backend="aot_eager", fullgraph=True)
    return error_of(fast, x, y), error_of(loss, x, y)


class Results(TorchDispatchMode):
    """Records the results of operators: each tensor's shape, strides, dtype and device."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        found = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name.startswith("fastclip::rank_"):
            self.of[name] = [(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in found]
            every = [*found, *(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))]
            shared = {t.untyped_storage()._cdata for t in every if t.numel()}
            given = {t.untyped_storage()._cdata for t in every[len(found) :] if t.numel()}
            results = sum(t.numel() > 0 for t in found)
            self.of[name + " apart"] = [(len(shared) - len(given) == results,)]
        return found


def shapes(rank: int, world_size: int, cases: list[Case]) -> list[tuple[dict, dict]]:
    """The recorded results of each case's operators, and those of their fakes."""
    found = []
    for case in cases:
        loss, inputs = loss_of(case, rank), inputs_of(case, 6, rank)
        seen = []
        for mode in (nullcontext(), FakeTensorMode()):
            if isinstance(mode, FakeTensorMode):
                inputs = [mode.from_tensor(t) for t in inputs]
            # Calls the operators as in a graph, without a compiler.
            traced = mock.patch.object(torch.compiler, "is_compiling", lambda: True)
            with traced, mode, Results() as operators:
                results(loss, inputs, 2.0)
            seen.append(operators.of)
        found.append(tuple(seen))
    return found


def training_step(rank: int, world_size: int, around: str) -> float:
    """The largest error of a compiled step's gradients, against those of one process."""
    torch._dynamo.reset()
    model = Towers().double()
    if around == "DDP":
        model = DistributedDataParallel(
            torch.compile(Whole(model, rank, world_size), backend="aot_eager", fullgraph=True)
        )
        model(*own(rank, data(world_size))).backward()
    else:
        step = torch.compile(
            lambda images, texts: distributed.clip_loss(*model(images, texts)) * 1.0,
            backend="aot_eager", fullgraph=True,
        )  # fmt: skip
        step(*own(rank, data(world_size))).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= world_size
    found = {name.rpartition("towers.")[2]: p.grad for name, p in model.named_parameters()}
    return worst(found, gradients_of_one_process(world_size))


class Whole(nn.Module):
    """Towers and their loss."""

    def __init__(self, towers: nn.Module, rank: int, world_size: int) -> None:
        super().__init__()
        self.towers = towers
        self.loss = ClipLoss(True, True, rank=rank, world_size=world_size)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.loss(*self.towers(images, texts))


def second_derivative(rank: int, world_size: int) -> str:
    """The error of a second derivative, in a graph with eager autograd."""
    torch._dynamo.reset()
    x = torch.ones(3, 6, requires_grad=True)
    loss = torch.compile(distributed.clip_loss, backend="eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(loss(x, torch.ones(3, 6), 2.0), x, create_graph=True)
    return error_of(gradient.sum().backward)


def uneven(rank: int, world_size: int) -> tuple[float, int]:
    """The largest error against eager mode on an uneven batch, and the number of graphs."""
    torch._dynamo.reset()
    x, y = (torch.randn(4 + rank, 6, requires_grad=True) for _ in range(2))

    def step(x: Tensor, y: Tensor) -> Tensor:
        return distributed.clip_loss(x * 1.0, y, 2.0, uneven=True) * 2.0

    counter = CompileCounterWithBackend("aot_eager")
    ours, eager = (results(f, [x, y], 1.0) for f in (torch.compile(step, backend=counter), step))
    return max(float((a - b).norm()) for a, b in zip(ours, eager, strict=True)), counter.frame_count
