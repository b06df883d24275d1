"""A check of every engine that can run here: losses and gradients against float64, with times."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import loss, reference
from ..engine import backends

SECONDS = 0.06  # of timing, for each loss, dtype and engine
# The features' shape. A GPU waits for launches at smaller ones; Triton's interpreter takes minutes
# at larger ones.
SHAPES = {"cpu": (512, 256), "cuda": (4096, 512), "interpreter": (32, 16)}
# The largest error that is taken for rounding, if plain PyTorch's own is smaller than a quarter.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[float, ...]]] = {
    "CLIP": (loss.clip_loss, reference.clip_loss, (20.0,)),
    "SigLIP": (loss.siglip_loss, reference.siglip_loss, (10.0, -10.0)),
}


class Row(NamedTuple):
    """One engine's result. Errors are relative; that of gradients is the largest of any input's."""

    device: str
    loss: str
    dtype: str
    shape: tuple[int, int]
    engine: str  # "dense": plain PyTorch with the whole matrix
    ms: float | None  # of a forward and a backward
    error: float | None
    problem: str = ""


def run() -> list[Row]:
    """Checks the engines of every device type, the dense loss first."""
    available = {name for name, told in backends.backends().items() if told == backends.AVAILABLE}
    cpu = [name for name in ("cpu", "torch") if name in available]
    rows = _device("cpu", SHAPES["cpu"], cpu)
    if "triton" in available and backends.interpreted():
        rows += _device("cpu", SHAPES["interpreter"], ["triton"], timed=False)
    if torch.cuda.is_available():
        cuda = [name for name in ("cuda", "triton", "torch") if name in available]
        rows += _device("cuda", SHAPES["cuda"], cuda)
    return rows


def _device(
    device: str, shape: tuple[int, int], engines: Sequence[str], timed: bool = True
) -> list[Row]:
    rows = []
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(shape, generator=generator), dim=1) for _ in range(2)]
    for name, (fused, dense, scalars) in LOSSES.items():
        for dtype in ROUNDING:
            leaves = [t.to(device, dtype) for t in features]
            leaves += [torch.tensor(value, device=device) for value in scalars]
            case = (device, name, str(dtype).removeprefix("torch."), shape)
            try:
                truth = _results(dense, [t.double() for t in leaves])
            except RuntimeError:  # such as a lack of memory: these engines cannot be judged
                rows.append(Row(*case, "float64", None, None))
                continue
            plain = _row((*case, "dense"), dense, leaves, truth, float("inf"), timed)
            rows.append(plain)
            limit = max(ROUNDING[dtype], 4 * (plain.error or 0))
            for engine in engines:
                function = functools.partial(fused, backend=engine)
                rows.append(_row((*case, engine), function, leaves, truth, limit, timed))
    return rows


def _row(
    case: tuple[str, str, str, tuple[int, int], str], function: Callable[..., Tensor],
    leaves: Sequence[Tensor], truth: Sequence[Tensor], limit: float, timed: bool,
) -> Row:  # fmt: skip
    device, name, dtype, _, engine = case
    where = f"engine {engine}, {name}, {dtype}, on {device}"
    try:
        error = _error(_results(function, leaves), truth)
        ms = _milliseconds(function, leaves) if timed else None
    except Exception as caught:  # a report has to come to its end
        told = f"{type(caught).__name__}: {str(caught).strip()}".partition("\n")[0]
        return Row(*case, None, None, "" if engine == "dense" else f"{where}: {told}")
    if error is None:
        return Row(*case, ms, None, f"{where}: a loss or a gradient is not finite")
    problem = "" if error <= limit else f"{where}: the error is {error:.1e}, at most {limit:.1e}"
    return Row(*case, ms, error, problem)


def _results(function: Callable[..., Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float | None:
    """The largest error of a result, relative to its largest element; None if one is not finite."""
    errors = [
        float((a.double() - b).abs().max() / b.abs().max())
        for a, b in zip(results, truth, strict=True)
    ]
    return max(errors) if all(map(math.isfinite, errors)) else None


def _milliseconds(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> float:
    """The median of calls, of which the first was made before."""
    finish = torch.cuda.synchronize if leaves[0].is_cuda else lambda: None
    times: list[float] = []
    finish()
    while not times or (sum(times) < SECONDS and len(times) < 100):
        began = time.perf_counter()
        _results(function, leaves)
        finish()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)
