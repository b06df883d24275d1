"""The Triton engine: the operators for CUDA tensors, installed as `fastclip.triton_kernels`.

Importing this package imports no Triton and touches no device: each operator imports the engine
when it is first called.

On the host:

    engine.py          the operators
    logit_block.py     a block's operands and their layout
    targets.py         the same of a block's targets
    first_sweep.py     the first sweep: the shift, launches over chunks, their sums
    second_sweep.py    the second sweep: chunks of weights, two library products for each
    lines.py           shifts and coefficients of lines, for the second sweep
    complete.py        the end of the second sweep: products become gradients
    plan.py            chunks, buffers, memory and traffic, as plain arithmetic
    configurations.py  tile sizes, warps, stages, slices for each architecture; candidates
    launch.py          the one place to launch from, on the features' device
    kept.py            the layout of the tensor that a first sweep keeps
    kinds.py           every kind, as functions that kernels apply to a tile of logits
    constants.py       numbers that kernels and host code share

On the device, in `kernels/`:

    tile.py            a tile of <x_i, y_j>: its place, product, slices, stores
    logits.py          from products to logits; which pairs count
    targets.py         the products of targets beside a tile's own
    sweep.py           the first sweep: folds a tile into sums of rows and columns, keeps weights
    weigh.py           the second sweep: computes the weights of a tile
    weigh_kept.py        or reads those that were kept
    complete.py        from products of weights and features to gradients
    bound.py           the shift that all lines of a softmax sweep share
    finalise.py        from partial sums to float64 states, in a fixed order
    flags.py           device flags that decide which of several launches works
    tf32.py            features rounded to tf32
    split_product.py   an fp32 product made of bf16 products, as accurate; opt-in
    bf16_parts.py        its operands
    split_gradients.py   its weights' products with the features

Tests run the kernels in Triton's interpreter and compile them for five architectures.
`configurations.py` says which tiles were timed on a card.
"""

if "." not in __name__:
    # A package of the Triton project has the bare name, and libraries that probe for it must not
    # find this folder instead when the source root is on sys.path.
    raise ImportError(
        f"fastclip's kernels are fastclip.triton_kernels, not {__name__!r}: "
        "the folder that holds fastclip's sources is on sys.path"
    )

from typing import Any

import torch

from ..engine import torch_engine
from ..engine.block import Block

# Torch 2.10, the oldest supported, was built with this version.
OLDEST_TRITON = (3, 6)


def _operator(name: str, block: Block) -> Any:
    """Returns an operator of this engine, or the plain PyTorch engine's for float64 features."""
    if block.x.features.dtype == torch.float64:
        return getattr(torch_engine, name)
    from . import engine

    return getattr(engine, name)


def sweep(block: Block, *arguments: Any) -> Any:
    return _operator("sweep", block)(block, *arguments)


def finish(*arguments: Any) -> Any:
    from . import engine  # also for float64 features: states are float64 for every dtype

    return engine.finish(*arguments)


def weigh(block: Block, *arguments: Any) -> Any:
    return _operator("weigh", block)(block, *arguments)


def sweep_and_weigh(block: Block, *arguments: Any) -> Any:
    return _operator("sweep_and_weigh", block)(block, *arguments)
