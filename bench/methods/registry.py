"""Every method of the benchmark: how it is made for a case, and the matmul passes it needs.

A method that cannot run here raises `Unavailable` with the reason; none is left out silently.
fastclip's own engines are methods like any other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..cases import CONTRAST, STREAMED, Case, Inputs
from ..losses import LOSSES, loss_of
from . import on_contrast, open_clip, peers, rectangular

LossFunction = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
# Returns loss, dx, dy, dscale, dbias: as many of them as were asked for.
Step = Callable[[], tuple["Tensor | None", ...]]


class Unavailable(Exception):
    """Raised, with the reason, if a method cannot run."""


@dataclass(frozen=True)
class Method:
    """One method. `make` and `passes` take a case and a device; `passes` counts the matmuls of
    2 M N D FLOP that the method needs. Each run is made inside the context `within`, if any."""

    name: str
    text: str
    make: Callable[[Case, str], LossFunction]
    passes: Callable[[Case, str], float]
    within: Callable[[], contextlib.AbstractContextManager[None]] | None = None


def make_step(case: Case, method: str, inputs: Inputs) -> Step:
    """Returns a step: a function that computes the loss, then the gradients in the order of
    `inputs.leaves`.

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
    return captured(step, device) if case.mode == "graph" else step


def _run_within(
    within: Callable[[], contextlib.AbstractContextManager[None]], step: Step
) -> tuple[Tensor | None, ...]:
    with within():
        return step()


def captured(step: Step, device: str) -> Step:
    """The step as one replay of a CUDA graph; each replay overwrites the results of the last."""
    if device != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device: --device cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and lets libraries allocate their work space
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


def _dense(case: Case, device: str) -> LossFunction:
    return loss_of(case.loss).dense


def _checkpointed(case: Case, device: str) -> LossFunction:
    return loss_of(case.loss).checkpointed


def _compiled(case: Case, device: str) -> LossFunction:
    # Static shapes give the compiler's best code for each case. Without the reset its limit on
    # recompilations would make later cases fall back to eager.
    torch._dynamo.reset()
    return torch.compile(loss_of(case.loss).dense, dynamic=False, fullgraph=True)


# ---- open_clip ---------------------------------------------------------------------------------


def _open_clip(case: Case, device: str) -> LossFunction:
    return getattr(open_clip.import_module("open_clip.loss"), loss_of(case.loss).module)()


# ---- fastclip ----------------------------------------------------------------------------------


def _engine(device: str, wanted: str | None) -> str | None:
    """The backend to request: the wanted one, else C++ on CPUs and fastclip's choice elsewhere."""
    import fastclip

    engine = wanted or ("cpu" if device == "cpu" else None)
    availability = "available" if engine is None else fastclip.backends().get(engine, "unknown")
    if availability != "available":
        raise Unavailable(f"backend {engine!r}: {availability}")
    return engine


def _fastclip(
    case: Case, device: str, wanted: str | None, budget: int | None, needs_fused: bool = False
) -> LossFunction:
    loss, engine = loss_of(case.loss), _engine(device, wanted)
    if needs_fused and not fused_is_built():
        raise Unavailable("fastclip was built without the fused kernels (CUTLASS's headers)")
    if budget == EVERYTHING:
        if loss.in_one_go:
            raise Unavailable(f"{loss.label} keeps nothing: its gradients are made in the forward")
        budget = bytes_of_everything(case)
    return partial(loss.of_fastclip(), backend=engine, memory_budget=budget)


def _on_contrast(case: Case, device: str, method: str) -> LossFunction:
    return on_contrast.make(case, method, device, _engine(device, None))


def fused_is_built() -> bool:
    """True if the CUDA engine has its tensor-core kernels."""
    import fastclip

    info = getattr(fastclip, "build_info", lambda: None)() or {}
    return bool(info.get("cuda") and info["cuda"].get("fused"))


def bytes_of_everything(case: Case) -> int:
    """A memory budget that no engine can exceed: one fp32 number per pair."""
    long, short = max(case.m, case.n), min(case.m, case.n)
    return 4 * (long + 16) * short


def _reference(case: Case, device: str) -> LossFunction:
    return loss_of(case.loss).of_fastclip("reference")


def _rectangular_step(case: Case, method: str, inputs: Inputs) -> Step:
    able = loss_of(case.loss).rectangular and method in STREAMED
    if inputs.x.device.type != "cpu" or not able or case.mode != "both":
        names = ", ".join(loss.label for loss in LOSSES.values() if loss.rectangular)
        raise Unavailable(f"rectangular blocks: {names}, forward and backward, on CPUs")
    engine = _engine("cpu", "torch" if method == "fastclip torch" else None)
    return partial(rectangular.clip, engine, inputs, _budget(method, "cpu"))


def _budget(method: str, device: str) -> int:
    """The bytes of products that fastclip may keep: its default, or 0."""
    from fastclip.engine.checks import budget_of

    return 0 if method == "fastclip budget=0" else budget_of(None, torch.device(device))


def _keeps_everything(case: Case, method: str) -> bool:
    kept = method.endswith(" kept") and case.mode != "forward"
    return kept and not loss_of(case.loss).in_one_go


def _in_one_go(case: Case, method: str) -> bool:
    """True if one sweep suffices. A loss on `contrast` takes two, whatever its kind."""
    return loss_of(case.loss).in_one_go and method not in CONTRAST


def kept_products(m: int, n: int, method: str, device: str) -> int:
    """Bytes of the rows of products that the budget keeps between two sweeps; only whole rows are
    kept. The PyTorch engine keeps none, and GPU engines keep none by default."""
    from fastclip.engine.kept import rows_to_keep

    if method == "fastclip torch" or device != "cpu":
        return 0
    return rows_to_keep(m, n, 4, _budget(method, device)) * min(m, n) * 4


def passes_of_two_sweeps(m: int, n: int, kept: int) -> float:
    """The passes of two sweeps; the second reuses the `kept` bytes of products."""
    return 4.0 - min(1.0, kept / (4 * m * n))


def kept_bytes(case: Case, method: str, device: str) -> int:
    """How many bytes of its memory budget a method uses: 0 for all but fastclip.

    A loss computed in one go keeps float32 gradients if the features have another dtype; any other
    loss keeps products.
    """
    if not method.startswith("fastclip") or case.mode == "forward":
        return 0
    if _keeps_everything(case, method):
        # For half-precision features the Triton engine keeps weights in half precision.
        return case.m * case.n * (2 if case.half and "triton" in method else 4)
    if _in_one_go(case, method):
        waiting = (case.m + case.n) * case.d * 4
        return waiting if case.dtype == "bfloat16" and waiting <= _budget(method, device) else 0
    return kept_products(case.m, case.n, method, device)


def _passes_of_fastclip(case: Case, device: str, method: str) -> float:
    if case.mode == "forward":
        return 1.0
    if _keeps_everything(case, method):
        return 3.0
    kept = kept_bytes(case, method, device)
    if _in_one_go(case, method):
        # The forward computes the gradients, too, if they may be held until the backward; on GPUs
        # they always may.
        return 3.0 if kept or case.dtype != "bfloat16" or device != "cpu" else 4.0
    return passes_of_two_sweeps(case.m, case.n, kept)


# ---- the table ---------------------------------------------------------------------------------


def _passes(forward: float, both: float) -> Callable[[Case, str], float]:
    def count(case: Case, device: str) -> float:
        return forward if case.mode == "forward" else both

    return count


def _peer(name: str) -> Method:
    peer = peers.PEERS[name]

    def make(case: Case, device: str) -> LossFunction:
        try:
            return peer.make(case, device)
        except peers.Missing as missing:
            raise Unavailable(str(missing)) from None

    return Method(name, peer.text, make, _passes(peer.forward, peer.both))


def _passes_a_direction(both: float) -> Callable[[Case, str], float]:
    """The passes of losses that compute their logits again for each direction."""

    def count(case: Case, device: str) -> float:
        return loss_of(case.loss).directions * (1.0 if case.mode == "forward" else both)

    return count


# In place of a memory budget: enough bytes to keep every product of the case.
EVERYTHING = -1


@contextlib.contextmanager
def fused_tiles() -> Iterator[None]:
    """Selects the CUDA engine's own kernels, by a variable that it reads at every call."""
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


def _contrast(name: str, text: str) -> Method:
    passes = partial(_passes_of_fastclip, method=name)
    return Method(name, text, partial(_on_contrast, method=name), passes)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("open_clip", "open_clip's ClipLoss, SigLipLoss", _open_clip, _passes_a_direction(3)),
        Method("dense", "plain PyTorch, eager", _dense, _passes(1, 3)),
        Method("compiled", "the same under torch.compile", _compiled, _passes(1, 3)),
        Method("reference", "fastclip.reference, eager", _reference, _passes(1, 3)),
        Method("checkpoint", "chunks, each checkpointed", _checkpointed, _passes_a_direction(4)),
        _own("fastclip", "the default engine", None),
        _own("fastclip budget=0", "the same, nothing kept", None, 0),
        _own("fastclip torch", 'backend="torch"', "torch"),
        _contrast("fastclip contrast", "the loss written on `contrast`"),
        _contrast("fastclip contrast ids", "the same with ids, all different"),
        _contrast("fastclip contrast margin", "the same with a margin, none beyond"),
        _own("fastclip triton", 'backend="triton"', "triton"),
        _own("fastclip cuda", 'backend="cuda"', "cuda"),
        _own("fastclip triton kept", "the same, every product kept", "triton", EVERYTHING),
        _own("fastclip cuda kept", "the same, every product kept", "cuda", EVERYTHING),
        _own("fastclip cuda fused", "its own tensor-core kernels", "cuda", fused=True),
        *(_peer(name) for name in peers.PEERS),
    )
}
