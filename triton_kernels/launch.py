"""What every launch has in common: the card's stream, its settings, and one place to launch from.

Launches go to the current stream of the features' device. float64 is the plain engine's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastclip.engine import preference
from fastclip.engine.block import Block

from .configurations import SHARED_MEMORY, Config
from .epilogues import INTERPRETED

# Lanes of single programs.
LANES = 1024
# Rows and columns of a program that goes over features alone. The interpreter takes as long for
# many as for few.
ROWS, COLUMNS = (64 if INTERPRETED.value else 8), 128
# In how many parts a tile of the edges goes through the epilogue: masks take registers.
EDGE_SLICES = 1 if INTERPRETED.value else 4


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    kernel[(programs,)](*arguments, **constants)


def described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def stored(out: Tensor | None, config: Config) -> Any:
    """A matrix that plain tiles are written to, as their kernel takes it."""
    if out is None or not config.descriptors:
        return out
    return described(out, config.bm, config.bn // config.slices)


@functools.cache
def _processors(device: torch.device) -> int:
    if INTERPRETED.value:
        return 2  # fewer than the tiles of a test
    return torch.cuda.get_device_properties(device).multi_processor_count


def room(device: torch.device, config: Config, itemsize: int) -> int:
    """Programs that run at the same time: one of eight warps has registers for no other beside it,
    two of four warps may not have the shared memory."""
    step = (config.bm + config.bn) * config.bk * itemsize
    by_memory = SHARED_MEMORY["sm_90"] // (config.stages * step)
    return _processors(device) * max(1, min(8 // config.warps, by_memory))


def on_its_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operator)
    def run(first: Block | Tensor, *arguments: Any) -> Any:
        x = first.x.features if isinstance(first, Block) else first
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return operator(first, *arguments)

    return run


def takes_split(x: Tensor) -> bool:
    """Whether fp32 products are made of bf16 ones."""
    return preference.products_of(x.dtype) == "split"


def takes_tf32(x: Tensor) -> bool:
    """Whether the user lets fp32 matmuls round their operands to tf32."""
    return preference.tf32() and x.dtype == torch.float32 and not torch.version.hip
