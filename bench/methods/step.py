"""Makes a step: one call that computes a case's loss, and its gradients, by one method."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..case import Case, Inputs
from ..cases import STREAMED
from ..losses import LOSSES, loss_of
from . import rectangular, registry
from .passes import budget_of_method
from .registry import Unavailable

# Returns loss, dx, dy, dscale, dbias: as many of them as were asked for.
Step = Callable[[], tuple["Tensor | None", ...]]


def make_step(case: Case, method: str, inputs: Inputs) -> Step:
    """Returns a step: a function that computes the loss, then the gradients in the order of
    `inputs.slots`, with None for an input that the loss does not have.

    Raises:
        Unavailable, ImportError: with the reason why the method cannot run here or on this case.
    """
    device = inputs.x.device.type
    if not case.square and method.startswith("fastclip"):
        return _rectangular_step(case, method, inputs)
    loss = registry.METHODS[method].make(case, device)
    call = partial(loss_of(case.loss).call, loss, inputs)
    autocast = contextlib.nullcontext()
    if case.dtype == "autocast":
        autocast = torch.autocast(device, torch.bfloat16)

    def forward() -> tuple[Tensor | None, ...]:
        with torch.no_grad(), autocast:
            return (call(),)

    def both() -> tuple[Tensor | None, ...]:
        with autocast:
            value = call()
        found = iter(torch.autograd.grad(value, inputs.leaves, allow_unused=True))
        return value.detach(), *(None if t is None else next(found) for t in inputs.slots)

    step = forward if case.mode == "forward" else both
    if within := registry.METHODS[method].within:
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


def _rectangular_step(case: Case, method: str, inputs: Inputs) -> Step:
    able = loss_of(case.loss).rectangular and method in STREAMED
    if inputs.x.device.type != "cpu" or not able or case.mode != "both":
        names = ", ".join(loss.label for loss in LOSSES.values() if loss.rectangular)
        raise Unavailable(f"rectangular blocks: {names}, forward and backward, on CPUs")
    engine = registry.engine_of("cpu", "torch" if method == "fastclip torch" else None)
    return partial(rectangular.clip, engine, inputs, budget_of_method(method, "cpu"))
