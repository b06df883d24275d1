"""Every method of the benchmark: how it is made for a case, and the passes that it needs.

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

from ..case import Case
from ..losses import loss_of
from . import on_contrast, open_clip, peers
from .passes import (
    bytes_of_everything,
    passes_a_direction,
    passes_of_dense,
    passes_of_fastclip,
    passes_of_peer,
)

# Takes the arguments of the case's loss.
LossFunction = Callable[..., Tensor]


# In place of a memory budget: enough bytes to keep every product of the case.
EVERYTHING = -1


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


# ---- plain PyTorch -----------------------------------------------------------------------------


def _dense(case: Case, device: str) -> LossFunction:
    return loss_of(case.loss).dense


def _checkpointed(case: Case, device: str) -> LossFunction:
    loss = loss_of(case.loss)
    if loss.checkpointed is None:
        raise Unavailable("the loss has no checkpointed form")
    return loss.checkpointed


def _compiled(case: Case, device: str) -> LossFunction:
    # Static shapes give the compiler's best code for each case. Without the reset its limit on
    # recompilations would make later cases fall back to eager.
    torch._dynamo.reset()
    return torch.compile(loss_of(case.loss).dense, dynamic=False, fullgraph=True)


# ---- open_clip ---------------------------------------------------------------------------------


def _open_clip(case: Case, device: str) -> LossFunction:
    loss = loss_of(case.loss)
    if loss.module is None:
        raise Unavailable(f"has no {case.loss} loss")
    return loss.of_open_clip(getattr(open_clip.import_module("open_clip.loss"), loss.module)())


# ---- fastclip ----------------------------------------------------------------------------------


def engine_of(device: str, wanted: str | None) -> str | None:
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
    loss, engine = loss_of(case.loss), engine_of(device, wanted)
    if needs_fused and not fused_is_built():
        raise Unavailable("fastclip was built without the fused kernels (CUTLASS's headers)")
    if budget == EVERYTHING:
        if loss.in_one_go:
            raise Unavailable(f"{loss.label} keeps nothing: its gradients are made in the forward")
        budget = bytes_of_everything(case)
    return partial(loss.of_fastclip(), backend=engine, memory_budget=budget)


def _on_contrast(case: Case, device: str, method: str) -> LossFunction:
    loss = loss_of(case.loss)
    if loss.on_lines is None:
        raise Unavailable("the loss is itself written on `contrast`")
    return on_contrast.make(case, method, device, engine_of(device, None))


def fused_is_built() -> bool:
    """True if the CUDA engine has its tensor-core kernels."""
    import fastclip

    info = getattr(fastclip, "build_info", lambda: None)() or {}
    return bool(info.get("cuda") and info["cuda"].get("fused"))


def _reference(case: Case, device: str) -> LossFunction:
    return loss_of(case.loss).of_fastclip("reference")


# ---- the table ---------------------------------------------------------------------------------


def _peer(name: str) -> Method:
    def make(case: Case, device: str) -> LossFunction:
        try:
            return peers.make(name, loss_of(case.loss).peers.get(name), case, device)
        except peers.Missing as missing:
            raise Unavailable(str(missing)) from None

    return Method(name, peers.LIBRARIES[name].text, make, partial(passes_of_peer, name=name))


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
    passes = partial(passes_of_fastclip, method=name)
    return Method(name, text, make, passes, fused_tiles if fused else None)


def _contrast(name: str, text: str) -> Method:
    passes = partial(passes_of_fastclip, method=name)
    return Method(name, text, partial(_on_contrast, method=name), passes)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("open_clip", "open_clip's class", _open_clip, passes_a_direction(0)),
        Method("dense", "plain PyTorch, eager", _dense, passes_of_dense),
        Method("compiled", "the same under torch.compile", _compiled, passes_of_dense),
        Method("reference", "fastclip.reference, eager", _reference, passes_of_dense),
        Method("checkpoint", "chunks, each checkpointed", _checkpointed, passes_a_direction(1)),
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
        *(_peer(name) for name in peers.LIBRARIES),
    )
}
