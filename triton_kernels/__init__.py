"""The Triton engine: the operators for CUDA tensors, installed as `fastclip.triton_kernels`.

Importing this package imports no Triton and touches no device: each operator imports the engine
when it is first called.

    epilogues.py       every kind once, as functions of a tile of logits
    logits.py          from products to logits; which pairs count
    tile.py            a tile of <x_i, y_j>: its place, product, slices, stores
    flags.py           which of several launches is to work: the device decides
    bound.py           the one reference of a softmax sweep, made on the device
    fold.py            the first sweep: what rows and columns remember of a tile, what is kept of it
    finalise.py        partial sums to float64 states, in a fixed order
    weights.py         the second sweep: the weights of a tile, made or read
    split.py           an fp32 product of bf16 ones that is as accurate; opt-in
    parts.py             its operands
    split_gradients.py   its weights' products with the features
    complete.py        from products of weights and features to gradients
    configurations.py  tile sizes, warps, stages, slices for each architecture; candidates
    plan.py            launches, their buffers and their traffic, as plain arithmetic
    card.py            one place to launch from, on the features' device
    kept.py            what lies where in the tensor that a first sweep keeps
    block.py           the host's side: a block's operands and layout
    states.py            of the first sweep
    gradients.py         of the second: two library products a chunk
    engine.py          the operators

The kernels have been executed in Triton's interpreter and compiled for five architectures. They
have not been timed.
"""

if __name__ != "fastclip.triton_kernels":
    # A package of the Triton project has the bare name, and libraries that probe for it must not
    # find this folder instead when the source root is on sys.path.
    raise ImportError(
        f"fastclip's kernels are fastclip.triton_kernels, not {__name__!r}: "
        "the folder that holds fastclip's sources is on sys.path"
    )

from typing import Any

import torch

from fastclip.engine import torch_engine
from fastclip.engine.block import Block

# The one that torch 2.10, the oldest supported, was built with.
OLDEST_TRITON = (3, 6)


def _operator(name: str, block: Block) -> Any:
    """float64 features are the plain engine's."""
    if block.x.features.dtype == torch.float64:
        return getattr(torch_engine, name)
    from . import engine

    return getattr(engine, name)


def sweep(block: Block, *arguments: Any) -> Any:
    return _operator("sweep", block)(block, *arguments)


def finish(*arguments: Any) -> Any:
    from . import engine  # its states are float64 always

    return engine.finish(*arguments)


def weigh(block: Block, *arguments: Any) -> Any:
    return _operator("weigh", block)(block, *arguments)


def sweep_and_weigh(block: Block, *arguments: Any) -> Any:
    return _operator("sweep_and_weigh", block)(block, *arguments)
