"""Every method of the benchmark: how it is made for a case, and the matmul passes it is due.

A method that cannot run here says why by raising `Unavailable`; it is never left out silently.
fastclip's own engines are methods like any other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import open_clip, peers, rectangular
from .cases import Case, Inputs

Loss = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
Step = Callable[
    [], tuple["Tensor | None", ...]
]  # loss, dx, dy, dscale, dbias: as many as asked for

CHECKPOINT_ROWS = 1024


class Unavailable(Exception):
    """Why a method cannot run."""


@dataclass(frozen=True)
class Method:
    """`make` and `passes` take a case and a device; passes are the matmuls of 2 M N D FLOP that the
    method cannot do without. `within`, if any, is entered for each run and left after it."""

    name: str
    text: str
    make: Callable[[Case, str], Loss]
    passes: Callable[[Case, str], float]
    within: Callable[[], contextlib.AbstractContextManager[None]] | None = None


def make_step(case: Case, method: str, inputs: Inputs) -> Step:
    """One call of the method: the loss, then the gradients in the order of `inputs.leaves`.

    Raises:
        Unavailable, ImportError: with the reason why the method cannot run here or on this case.
    """
    device = inputs.x.device.type
    if not case.square and method.startswith("fastclip"):
        return _rectangular_step(case, method, inputs)
    loss = METHODS[method].make(case, device)
    x, y, scale, bias = inputs.x, inputs.y, inputs.scale, inputs.bias
    autocast = contextlib.nullcontext()
    if case.dtype == "autocast":
        autocast = torch.autocast(device, torch.bfloat16)

    def forward() -> tuple[Tensor | None, ...]:
        with torch.no_grad(), autocast:
            return (loss(x, y, scale, bias),)

    def both() -> tuple[Tensor | None, ...]:
        with autocast:
            value = loss(x, y, scale, bias)
        return value.detach(), *torch.autograd.grad(value, inputs.leaves, allow_unused=True)

    step = forward if case.mode == "forward" else both
    if within := METHODS[method].within:
        step = partial(_run_within, within, step)
    return _captured(step, device) if case.mode == "graph" else step


def _run_within(
    within: Callable[[], contextlib.AbstractContextManager[None]], step: Step
) -> tuple[Tensor | None, ...]:
    with within():
        return step()


def _captured(step: Step, device: str) -> Step:
    """The step as one replay of a CUDA graph; what it returns is overwritten by the next."""
    if device != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device: --device cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and lets libraries take their work space
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> tuple[Tensor | None, ...]:
        graph.replay()
        return results

    return replay


# ---- plain PyTorch -----------------------------------------------------------------------------


def dense_clip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """What is written where no library is at hand: one logit matrix and its transpose."""
    logits = scale * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    own_columns = logits[:, : len(x)]
    return (F.cross_entropy(logits, labels) + F.cross_entropy(own_columns.T, labels)) / 2


def dense_siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The same for SigLIP."""
    logits = scale * x @ y.T + bias
    labels = 2 * torch.eye(len(x), dtype=logits.dtype, device=x.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def checkpointed_clip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax over chunks of rows, then over chunks of columns, each recomputed in the backward."""
    labels = torch.arange(len(x), device=x.device)

    def chunk(a: Tensor, b: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((scale * a @ b.T).float(), labels, reduction="sum")

    total = torch.zeros((), device=x.device)
    for a, b in ((x, y), (y, x)):
        for some, own in zip(a.split(CHECKPOINT_ROWS), labels.split(CHECKPOINT_ROWS), strict=True):
            total = total + checkpoint(chunk, some, b, scale, own, use_reentrant=False)
    return total / (2 * len(x))


def checkpointed_siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The same for SigLIP, which is one sum over all pairs."""

    def chunk(a: Tensor, y: Tensor, scale: Tensor, bias: Tensor, first: int) -> Tensor:
        logits = (scale * a @ y.T + bias).float()
        labels = torch.full_like(logits, -1)
        labels.diagonal(first).fill_(1)
        return -F.logsigmoid(labels * logits).sum()

    total = torch.zeros((), device=x.device)
    for first in range(0, len(x), CHECKPOINT_ROWS):
        some = x[first : first + CHECKPOINT_ROWS]
        total = total + checkpoint(chunk, some, y, scale, bias, first, use_reentrant=False)
    return total / len(x)


_DENSE = {"clip": dense_clip, "siglip": dense_siglip}
_CHECKPOINTED = {"clip": checkpointed_clip, "siglip": checkpointed_siglip}


def _dense(case: Case, device: str) -> Loss:
    return _DENSE[case.loss]


def _checkpointed(case: Case, device: str) -> Loss:
    return _CHECKPOINTED[case.loss]


def _compiled(case: Case, device: str) -> Loss:
    # Each shape gets its own code, the best that the compiler can do; and its limit on
    # recompilations, meant for accidents, must not send later cases back to eager.
    torch._dynamo.reset()
    return torch.compile(_DENSE[case.loss], dynamic=False, fullgraph=True)


# ---- open_clip ---------------------------------------------------------------------------------


def _open_clip(case: Case, device: str) -> Loss:
    losses = open_clip.import_module("open_clip.loss")
    return losses.ClipLoss() if case.loss == "clip" else losses.SigLipLoss()


# ---- fastclip ----------------------------------------------------------------------------------


def _engine(device: str, wanted: str | None) -> str | None:
    """The backend to ask for: the wanted one, else C++ on CPUs and fastclip's choice elsewhere."""
    import fastclip

    engine = wanted or ("cpu" if device == "cpu" else None)
    state = "available" if engine is None else fastclip.backends().get(engine, "unknown")
    if state != "available":
        raise Unavailable(f"backend {engine!r}: {state}")
    return engine


def _fastclip(
    case: Case, device: str, wanted: str | None, budget: int | None, needs_fused: bool = False
) -> Loss:
    from fastclip import loss as losses

    engine = _engine(device, wanted)
    if needs_fused and not fused_is_built():
        raise Unavailable("fastclip was built without the fused kernels (CUTLASS's headers)")
    if budget == EVERYTHING:
        if case.loss == "siglip":
            raise Unavailable("SigLIP keeps nothing: its gradients are made in the forward")
        budget = bytes_of_everything(case)
    chosen = losses.clip_loss if case.loss == "clip" else losses.siglip_loss
    return partial(chosen, backend=engine, memory_budget=budget)


def fused_is_built() -> bool:
    """True if the CUDA engine has its tensor-core kernels."""
    import fastclip

    info = getattr(fastclip, "build_info", lambda: None)() or {}
    return bool(info.get("cuda") and info["cuda"].get("fused"))


def bytes_of_everything(case: Case) -> int:
    """A memory budget that no engine can exceed: an fp32 number for each pair."""
    long, short = max(case.m, case.n), min(case.m, case.n)
    return 4 * (long + 16) * short


def _reference(case: Case, device: str) -> Loss:
    from fastclip import reference

    return reference.clip_loss if case.loss == "clip" else reference.siglip_loss


def _rectangular_step(case: Case, method: str, inputs: Inputs) -> Step:
    if inputs.x.device.type != "cpu" or case.loss != "clip" or case.mode != "both":
        raise Unavailable("rectangular blocks: CLIP, forward and backward, on CPUs")
    engine = _engine("cpu", "torch" if method == "fastclip torch" else None)
    budget = 0 if engine == "torch" else _budget(method, "cpu")  # that engine keeps nothing
    return partial(rectangular.clip, engine, inputs, budget)


def _budget(method: str, device: str) -> int:
    """The bytes that fastclip may keep: its default, or none."""
    from fastclip.inputs import budget_of

    return 0 if method == "fastclip budget=0" else budget_of(None, torch.device(device))


def _keeps_everything(case: Case, method: str) -> bool:
    return method.endswith(" kept") and case.loss == "clip" and case.mode != "forward"


def kept_bytes(case: Case, method: str, device: str) -> int:
    """How much of its memory budget a method fills: zero for all but fastclip.

    CLIP keeps whole rows of products, but the PyTorch engine none. SigLIP keeps float32 gradients
    where the features' own are of another dtype.
    """
    from fastclip.kept import rows_to_keep

    if not method.startswith("fastclip") or case.mode == "forward":
        return 0
    if _keeps_everything(case, method):
        # The Triton engine's weights of half features are in half precision.
        return case.m * case.n * (2 if case.half and "triton" in method else 4)
    budget = _budget(method, device)
    if case.loss == "siglip":
        waiting = (case.m + case.n) * case.d * 4
        return waiting if case.dtype == "bfloat16" and waiting <= budget else 0
    if method == "fastclip torch" or device != "cpu":
        return 0
    return rows_to_keep(case.m, case.n, 4, budget) * min(case.m, case.n) * 4


def _passes_of_fastclip(case: Case, device: str, method: str) -> float:
    if case.mode == "forward":
        return 1.0
    if _keeps_everything(case, method):
        return 3.0
    kept = kept_bytes(case, method, device)
    if case.loss == "siglip":
        # The forward makes the gradients as well, where they have room to wait for the backward:
        # on GPUs always.
        return 3.0 if kept or case.dtype != "bfloat16" or device != "cpu" else 4.0
    return 4.0 - min(1.0, kept / (4 * case.m * case.n))


# ---- the table ---------------------------------------------------------------------------------


def _passes(forward: float, clip: float, siglip: float) -> Callable[[Case, str], float]:
    def count(case: Case, device: str) -> float:
        return forward if case.mode == "forward" else {"clip": clip, "siglip": siglip}[case.loss]

    return count


def _peer(name: str) -> Method:
    peer = peers.PEERS[name]

    def make(case: Case, device: str) -> Loss:
        try:
            return peer.make(case, device)
        except peers.Missing as missing:
            raise Unavailable(str(missing)) from None

    return Method(name, peer.text, make, _passes(peer.forward, peer.both, peer.both))


def _open_clip_passes(case: Case, device: str) -> float:
    forward = (
        2.0 if case.loss == "clip" else 1.0
    )  # its ClipLoss makes the logits for each direction
    return forward if case.mode == "forward" else 3 * forward


def _checkpoint_passes(case: Case, device: str) -> float:
    forward = 2.0 if case.loss == "clip" else 1.0
    return forward if case.mode == "forward" else 4 * forward


# In the place of a memory budget: as much as the case can use.
EVERYTHING = -1


@contextlib.contextmanager
def fused_tiles() -> Iterator[None]:
    """The CUDA engine asks its environment at every call."""
    before = os.environ.get("FASTCLIP_CUDA_TILES", "library")
    os.environ["FASTCLIP_CUDA_TILES"] = "fused"
    try:
        yield
    finally:
        os.environ["FASTCLIP_CUDA_TILES"] = before


def _own(
    name: str, text: str, engine: str | None, budget: int | None = None, fused: bool = False
) -> Method:
    make = partial(_fastclip, wanted=engine, budget=budget, needs_fused=fused)
    passes = partial(_passes_of_fastclip, method=name)
    return Method(name, text, make, passes, fused_tiles if fused else None)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("open_clip", "open_clip's ClipLoss, SigLipLoss", _open_clip, _open_clip_passes),
        Method("dense", "plain PyTorch, eager", _dense, _passes(1, 3, 3)),
        Method("compiled", "the same under torch.compile", _compiled, _passes(1, 3, 3)),
        Method("reference", "fastclip.reference, eager", _reference, _passes(1, 3, 3)),
        Method("checkpoint", "chunks, each checkpointed", _checkpointed, _checkpoint_passes),
        _own("fastclip", "the default engine", None),
        _own("fastclip budget=0", "the same, nothing kept", None, 0),
        _own("fastclip torch", 'backend="torch"', "torch"),
        _own("fastclip triton", 'backend="triton"', "triton"),
        _own("fastclip cuda", 'backend="cuda"', "cuda"),
        _own("fastclip triton kept", "the same, every product kept", "triton", EVERYTHING),
        _own("fastclip cuda kept", "the same, every product kept", "cuda", EVERYTHING),
        _own("fastclip cuda fused", "its own tensor-core kernels", "cuda", fused=True),
        *(_peer(name) for name in peers.PEERS),
    )
}
