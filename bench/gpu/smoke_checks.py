"""The problems of the smoke test, and the verdicts on an engine's results.

An engine's error may exceed that of plain PyTorch in fp32 on the same features by a rounding of its
results. Two equal calls must return the same bits, also if one is the replay of a CUDA graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import loss_of
from ..measure.truth import Truth
from ..methods.step import captured

if TYPE_CHECKING:
    from fastclip import LineStatistics

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FP64, FP32 = torch.float64, torch.float32
# Runs the headline's kernels: plain tiles, descriptors, kept rows. It comes first, so that a cut
# run has checked them.
LARGE = (4099, 768)
# Blocks of up to 2,896 pairs have kernels of their own.
SMALL = (513, 96)
SHAPES = (LARGE, (1000, 520), SMALL, (3001, 520))
MASKED = ((1000, 520), (3001, 520))
SCALES = (14.3, 100.0, 500.0)
NAMES = ("loss", "dx", "dy", "dscale", "dbias")


@dataclass(frozen=True)
class Problem:
    """A loss with its inputs, computed by an engine, by plain PyTorch or in float64."""

    loss: str
    dtype: torch.dtype
    normalize: bool
    n: int
    d: int
    scale: float
    device: str

    def leaves(self) -> list[Tensor]:
        """x, y, scale and the bias, if there is one. Raw features have lengths from 1/2 to 2."""
        generator = torch.Generator(self.device).manual_seed(self.n + self.d)
        towers = torch.randn(2, self.n, self.d, device=self.device, generator=generator)
        towers = F.normalize(towers, dim=-1)
        if self.normalize:
            lengths = torch.rand(2, self.n, 1, device=self.device, generator=generator)
            towers = towers * torch.exp2(2 * lengths - 1)
        found = [*towers.to(self.dtype).unbind(), torch.tensor(self.scale, device=self.device)]
        if (bias := loss_of(self.loss).bias_on(self.device)) is not None:
            found.append(bias)
        return [leaf.clone().requires_grad_() for leaf in found]

    def step(self, engine: str, leaves: list[Tensor], budget: int = 0) -> tuple[Tensor, ...]:
        """The loss and its gradients by an engine. The upstream gradient is N, so that gradients
        are large enough for half precision."""
        function = loss_of(self.loss).of_fastclip()
        value = function(*leaves, normalize=self.normalize, backend=engine, memory_budget=budget)
        return self._results(value, leaves)

    def plain(self, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        """The same by plain PyTorch in fp32. If tf32 is allowed, features are rounded here, because
        it depends on the shape whether a library's matmul of small matrices rounds them."""
        wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
        x, y, scale, *bias = wide
        if self.normalize:
            x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        if self.dtype == torch.float32 and in_tf32():
            x, y = _as_tf32(x), _as_tf32(y)
        dense = loss_of(self.loss).dense
        return self._results(dense(x, y, scale, bias[0] if bias else None), wide)

    def _results(self, value: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        upstream = torch.full_like(value, float(self.n))  # filled on the device, for CUDA graphs
        return value.detach(), *torch.autograd.grad(value, leaves, upstream)

    def truth(self, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        """The same in float64. Gradients pass through the normalisation without autograd."""
        x, y, scale, *bias = (leaf.detach().double() for leaf in leaves)
        u, v = (F.normalize(t, dim=1) for t in (x, y)) if self.normalize else (x, y)
        exact: Truth = loss_of(self.loss).truth(u, v, scale, bias[0] if bias else None)
        dx, dy = exact.dx, exact.dy
        if self.normalize:
            dx, dy = _through_normalisation(x, u, dx), _through_normalisation(y, v, dy)
        gradients = [dx, dy, exact.dscale, *([exact.dbias] if bias else [])]
        return exact.loss, *(self.n * gradient for gradient in gradients)


def in_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _as_tf32(x: Tensor) -> Tensor:
    """Rounds to the nearest tf32 number; the gradient passes through unchanged."""
    bits = (x.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
    return x + (bits.view(torch.float32) - x).detach()


def _through_normalisation(x: Tensor, unit: Tensor, gradient: Tensor) -> Tensor:
    along = (gradient * unit).sum(1, keepdim=True)
    return (gradient - along * unit) / x.norm(dim=1, keepdim=True)


# Tensor cores truncate sums instead of rounding them (arXiv 2403.00232), after every 16 products:
# on average each truncation makes t too small by half a unit in its last place.
CUT_OFF = 2.0**-25


def logits_error(problem: Problem, x: Tensor, y: Tensor) -> float:
    """The error of tensor cores in the largest logit. A sweep, and its repetition with one shift
    per line, may differ by this much, and so may their weights."""
    if problem.device != "cuda" or problem.dtype.itemsize > 2:
        return 0.0
    if problem.normalize:
        x, y = F.normalize(x.float(), dim=1), F.normalize(y.float(), dim=1)
    t = (x.detach().float() @ y.detach().float().T).abs().amax()
    return float(problem.scale * t) * problem.d / 16 * CUT_OFF


def allowed(name: str, plain: float, dtype: torch.dtype, logits: float = 0.0) -> float:
    """The relative error allowed for an engine.

    plain: the error of plain PyTorch on the same features in fp32, or in tf32 if that is allowed.
    logits: the error of tensor cores in the logits.
    """
    if name in ("dx", "dy"):
        return 2 * plain + (0.6 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 2e-6)
    if dtype == torch.float32 and in_tf32():
        # Sums of many roundings: plain PyTorch's error may be small by luck.
        return 2 * plain + (2**-15 if name == "loss" else 2**-11)
    return 2 * plain + (2e-6 if name == "loss" else 2e-5) + logits


def judge(problem: Problem, engine: str, budget: int = 0) -> dict[str, object]:
    """The columns of a row for the result with the largest error relative to its limit."""
    leaves = problem.leaves()
    exact, plain = problem.truth(leaves), problem.plain(leaves)
    return _verdict(problem.step(engine, leaves, budget), exact, plain, problem, leaves)


def _verdict(
    got: tuple[Tensor, ...], exact: tuple[Tensor, ...], plain: tuple[Tensor, ...],
    problem: Problem, leaves: list[Tensor],
) -> dict[str, object]:  # fmt: skip
    worst, culprit, logits = 0.0, "", logits_error(problem, *leaves[:2])
    for name, value, true, rough in zip(NAMES, got, exact, plain, strict=False):
        error = _error(value, true)
        limit = allowed(name, _error(rough, true), problem.dtype, logits)
        ratio = error / limit if error == error else float("inf")
        if ratio >= worst:
            worst, culprit = ratio, f"{name} {error:.1e} of {limit:.1e}"
    status = "passed" if worst <= 1 else "FAILED"
    return {"status": status, "worst": worst, "of": culprit}


def _error(value: Tensor, true: Tensor) -> float:
    error, size = (value.detach().double() - true).norm(), true.norm()
    return float(error / size.clamp(min=1e-30))


def judge_rerun(problem: Problem, engine: str) -> dict[str, object]:
    leaves = problem.leaves()
    first, second = problem.step(engine, leaves), problem.step(engine, leaves)
    return _same(first, second)


def judge_graph(problem: Problem, engine: str) -> dict[str, object]:
    leaves = problem.leaves()
    replay = captured(partial(problem.step, engine, leaves), problem.device)
    return _same(problem.step(engine, leaves), replay())


def judge_kept(problem: Problem, engine: str) -> dict[str, object]:
    """`judge` with every product kept for the backward instead of recomputed."""
    return judge(problem, engine, budget_of_everything(problem))


def judge_masked(problem: Problem, engine: str) -> dict[str, object]:
    """Judges the statistics of `contrast` with ids, positives by id and a bias per column, against
    the dense ones in float64. There is no margin, because rounding may move a pair across it."""
    from fastclip import reference

    leaves = problem.leaves()
    wide = [[leaf.detach().to(t).requires_grad_() for leaf in leaves] for t in (FP64, FP32)]
    exact, plain = (_masked(reference.contrast, problem, leaves) for leaves in wide)
    return _verdict(masked_step(engine, problem, leaves), exact, plain, problem, leaves)


def masked_step(engine: str, problem: Problem, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    from fastclip import contrast

    return _masked(partial(contrast, backend=engine), problem, leaves)


def _masked(
    function: Callable[..., LineStatistics], problem: Problem, leaves: list[Tensor]
) -> tuple[Tensor, ...]:
    """The sum of all finite statistics, and its gradients. Three neighbouring rows, and the columns
    with the same numbers, share an id. The positives of the last rows are outside the block."""
    x, y, *_ = leaves
    ids = torch.arange(len(x), device=x.device) // 3
    key_bias = torch.linspace(-1, 1, len(y), device=x.device, dtype=leaves[2].dtype)
    found = function(
        *leaves, offset=2, ids=(ids, ids), same_id="positive", key_bias=key_bias,
        kind=loss_of(problem.loss).kind, normalize=problem.normalize,
    )  # fmt: skip
    value = sum(t[t.isfinite()].sum() for t in found if t is not None)
    return value.detach(), *torch.autograd.grad(value, leaves)


def budget_of_everything(problem: Problem) -> int:
    return 4 * problem.n * (problem.n + 16)


def _same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> dict[str, object]:
    pairs = zip(NAMES, one, other, strict=False)
    differ = [name for name, a, b in pairs if not torch.equal(a, b)]
    status = "FAILED" if differ else "passed"
    return {"status": status, "of": " ".join(differ)}


def checks(loss: str, dtype: str, device: str) -> Iterator[tuple[Problem, str]]:
    """Yields the problems of one process and the check for each, in order of importance."""
    for shape, normalize in itertools.product(SHAPES, (False, True)):
        lowest, *others, highest = (
            Problem(loss, DTYPES[dtype], normalize, *shape, scale, device) for scale in SCALES
        )
        for problem in (lowest, *others):
            yield problem, "accuracy"
        if not loss_of(loss).in_one_go:
            yield lowest, "kept"
            if shape == LARGE:
                yield highest, "kept"
        if shape in MASKED:
            yield lowest, "masked"
        yield lowest, "rerun"
        if device == "cuda" and shape in (LARGE, SMALL):
            yield lowest, "graph"
        yield highest, "accuracy"
