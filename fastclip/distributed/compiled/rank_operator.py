"""Defines operators of losses across ranks, and packs their arguments and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...engine.autograd import refuse_second_derivative
from ...engine.block import Block
from ...engine.namespace import NAMESPACE
from ..block_row import TENSOR_COUNT

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class Trace(NamedTuple):
    """Facts that are known while a graph is made but not inside the operators."""

    group: str  # the name of the process group; "": all processes
    ranks: int
    engine: str  # "" if no engine serves the call, which then fails when it runs
    needs: list[bool]  # which inputs require a gradient
    saves: bool  # a backward may follow
    source_digest: str  # of this library: another version may save other tensors

    SCHEMA = "str group, int ranks, str engine, bool[] needs, bool saves, str source_digest"


def define(name: str, schema: str, real: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines an operator. Its tag keeps it out of CUDA graphs, whose replays would skip what runs
    on the CPU: the agreement of the ranks."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.cudagraph_unsafe,))

    def run(*arguments: Any) -> list[Tensor]:
        with torch.no_grad():
            return real(*arguments)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def register_backward(
    name: str, backward: Callable[..., Any], count: int, results: Callable[[tuple[Any, ...]], int]
) -> None:
    """Registers the backward of an operator. count: how many of its arguments are inputs.

    results: maps the arguments after the inputs to the number of differentiable outputs.

    An autograd.Function would not do: it becomes a higher-order operator in the graph, and DDP's
    graph optimiser refuses these.
    """

    # torch passes these arguments by name.
    def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.arguments = inputs[count:]
        ctx.results = results(ctx.arguments)
        ctx.mark_non_differentiable(*output[ctx.results :])
        ctx.save_for_backward(*inputs[:count], *output)

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=save, lib=_library
    )


def split(options: type[Any], arguments: Sequence[Any]) -> tuple[Any, Trace]:
    """Splits an operator's last arguments into its options and the trace."""
    count = len(options._fields)
    return options(*arguments[:count]), Trace(*arguments[count:])


def leaves(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """The inputs with requires_grad as it was when the graph was made: the tensors that a graph
    passes to its operators have lost it."""
    return [
        t if t is None else t.detach().requires_grad_(needed)
        for t, needed in zip(inputs, needs, strict=True)
    ]


def gathered_tensors(row: Block, own: Block) -> list[Tensor]:
    """The tensors of a block row that its rank's own block does not have: what was gathered. An
    empty tensor stands for each of the others."""
    nothing = own.x.features.new_empty(0)
    both = zip(row.flat()[:TENSOR_COUNT], own.flat()[:TENSOR_COUNT], strict=True)
    return [nothing.new_empty(0) if t is None or t is mine else t for t, mine in both]


def with_gathered_tensors(own: Block, beside: Sequence[Tensor]) -> Block:
    """Rebuilds the block row from this rank's own block and the result of `gathered_tensors`."""
    flat = own.flat()
    both = zip(flat[:TENSOR_COUNT], beside, strict=True)
    block, _ = Block.of((*(t if t.numel() else mine for mine, t in both), *flat[TENSOR_COUNT:]))
    return block


def separate_memory(found: Sequence[Tensor]) -> list[Tensor]:
    """Copies: no two results of an operator may share memory."""
    return [t.clone(memory_format=torch.contiguous_format) for t in found]


def requested(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients that were requested, in memory of their own."""
    # The gradients of scale and bias are halves of one tensor.
    return [t.clone() if t.numel() == 1 else t for t in gradients if t is not None]


def fakes_like(inputs: Sequence[Tensor | None], arguments: Sequence[Any]) -> list[Tensor]:
    """Fakes of the gradients of the inputs that need one."""
    needs = Trace(*arguments[-len(Trace._fields) :]).needs
    return [t.new_empty(t.shape) for t, needed in zip(inputs, needs, strict=True) if needed]


def by_input(
    gradients: list[Tensor], needs: Sequence[bool], sources: Sequence[Tensor]
) -> list[Tensor | None]:
    """A gradient or None for each input. Differentiating them raises, as in eager mode."""
    found = iter(gradients)
    every = [next(found) if needed else None for needed in needs]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        every = refuse_second_derivative(every, *sources)
    return every
