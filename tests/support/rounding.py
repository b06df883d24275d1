"""The rounding errors of products that tests allow."""

import torch
from support.dense_block import accumulator
from support.judge import roundoff
from torch import Tensor


def takes_tf32(x: Tensor) -> bool:
    """Returns True if a GPU engine rounds these features, and weights, to tf32 in products."""
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def product_error(x: Tensor) -> float:
    """Returns the error of <x_i, y_j> for unit features."""
    d = x.shape[1]
    terms = 8 + d**0.5
    if x.is_cuda and (x.itemsize == 2 or takes_tf32(x)):
        # Tensor cores truncate, so the errors of terms of one sign add up. Emulated on pairs that
        # are alike: at most 0.1 D roundoffs on Ampere (8 products a step), 0.05 D on Hopper (16).
        terms += d / 8
    return terms * roundoff(accumulator(x.dtype))
