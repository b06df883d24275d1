"""The dtypes of products, sums and states, by the dtypes of features and the user's settings."""

from __future__ import annotations

import torch
from torch import Tensor

from .compile_marks import constant_in_graphs

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def state_dtype(device: torch.device) -> torch.dtype:
    """The dtype of states: float64, but float32 on Apple GPUs, which have nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums of products: float64 for float64 features, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype that the operands would have in the matmul that this loss replaces. All products of
    a block, those of targets included, have one dtype."""
    dtype = x.dtype
    for other in others:
        dtype = dtype if dtype == other.dtype else torch.promote_types(dtype, other.dtype)
    if dtype == torch.float64:
        return dtype
    device = x.device.type
    if device == "meta":
        return dtype
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if dtype == torch.float32 and device == "cpu" and _cpu_takes_bf16():
        return torch.bfloat16
    return dtype


@constant_in_graphs
def _cpu_takes_bf16() -> bool:
    """True if the user lets fp32 matmuls on CPUs round their operands to bf16."""
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"
