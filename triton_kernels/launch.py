"""The one place to launch kernels from, and the settings that launches share.

Launches go to the current stream of the features' device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..engine import arithmetic
from ..engine.block import Block
from .configurations import SHARED_MEMORY, Config
from .constants import INTERPRETED

# Numbers that one program of a kernel over lines or totals takes at a time.
LANES = 1024
# Rows and columns that a program takes at a time in the kernels that read features and multiply
# none. The interpreter takes as long for 64 rows as for 8.
ROWS, COLUMNS = (64 if INTERPRETED.value else 8), 128
# Slices in which a tile of the edges goes through the epilogue: masks take registers.
EDGE_SLICES = 1 if INTERPRETED.value else 4


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launches this number of programs of a kernel. Tests and tools replace this function, to count
    launches or to compile kernels without a card."""
    kernel[(programs,)](*arguments, **constants)


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Returns a descriptor that loads or stores blocks of rows x columns."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def output_argument(out: Tensor | None, config: Config) -> Any:
    """Returns a matrix that plain tiles are written to, in the form that their kernel takes."""
    if out is None or not config.descriptors:
        return out
    return descriptor(out, config.bm, config.bn // config.slices)


@functools.cache
def _processors(device: torch.device) -> int:
    if INTERPRETED.value:
        return 2  # fewer than the tiles of a test
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs_at_once(device: torch.device, config: Config, itemsize: int) -> int:
    """Returns how many programs run at the same time. A program of eight warps leaves no registers
    for a second one on its processor; two of four warps may lack the shared memory."""
    step = (config.bm + config.bn) * config.bk * itemsize
    # This is only called for configurations with descriptors, and sm_90 is the only architecture
    # that has any.
    by_memory = SHARED_MEMORY["sm_90"] // (config.stages * step)
    return _processors(device) * max(1, min(8 // config.warps, by_memory))


def on_its_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates an operator: it runs with its first argument's device as the current one."""

    @functools.wraps(operator)
    def run(first: Block | Tensor, *arguments: Any) -> Any:
        x = first.x.features if isinstance(first, Block) else first
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return operator(first, *arguments)

    return run


def takes_split(x: Tensor) -> bool:
    """True if products of these features are made of bf16 products."""
    return arithmetic.arithmetic_of(x.dtype) == "split"


def takes_tf32(x: Tensor) -> bool:
    """True if the user allows fp32 matmuls to round these features to tf32."""
    return arithmetic.tf32() and x.dtype == torch.float32 and not torch.version.hip
