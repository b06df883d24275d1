"""Every kind once, as three functions that the kernels take as compile-time arguments.

    fold(x)              what a pair adds to the sum that its row and its column remember
    activation(x)        its weight dL/ds up to the factor (a_i + b_j) of its row and column
    finish(shift, sum, s)   loss, coefficient and positive's weight of a line, in float64

x is the logit in log2 units, less the shift of all lines or of each (`logits.py`); a kind
without a shift has the shift 0. Masking, positives and sums are the kernels'. A new kind is
three such functions and an `Epilogue`, besides what `fastclip.kinds` asks of it; no kernel changes.
The same functions in C++: `csrc/epilogues.h`.
"""

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(2.0**-1022)  # float64's least normal number


@triton.jit
def quotient(a, b):
    """a / b for b between 1 and 2: there the card's reciprocal, an instruction, is off by two units
    in the last place at most. A division of any two floats takes a dozen."""
    if INTERPRETED:
        return a / b
    else:
        return libdevice.fast_dividef(a, b)


@triton.jit
def softmax_fold(x):
    return tl.exp2(x)


@triton.jit
def softplus(z):
    """log(1 + e^z) in float64; at -inf, a line without negatives, 0."""
    u = tl.exp(-tl.abs(z))
    w = 1 + u
    # What rounding 1 + u has lost, the quotient gives back.
    log1p = tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1.0, w - 1)))
    return tl.where(z <= 0, 0.0, z) + log1p


@triton.jit
def softmax_finish(shift, sum, s):
    # log(1 + R / P), in the log domain: neither R nor P needs to be representable.
    z = (tl.log2(sum) + shift) * LN2 - s
    total = sum + tl.exp2(s * LOG2E - shift)
    # Only matters to a line without negatives whose positive underflows.
    total = tl.where(total < TINY, TINY, total)
    return softplus(z), 1 / total, -sum / total


@triton.jit
def log1p_unit(u):
    """log(1 + u) for u in [0, 1]; relative error 5e-9 before rounding, also where u is small."""
    q = u * -3.24402461e-3 + 1.985145949e-2
    q = q * u - 5.695952952e-2
    q = q * u + 1.060365441e-1
    q = q * u - 1.530559230e-1
    q = q * u + 1.967593917e-1
    q = q * u - 2.495413364e-1
    q = q * u + 3.332996242e-1
    q = q * u - 4.999990242e-1
    q = q * u + 1.0
    return q * u


@triton.jit
def sigmoid_fold(x):
    # The maximum loses a NaN, the other term keeps it.
    return tl.maximum(x, 0.0) * LN2 + log1p_unit(tl.exp2(-tl.abs(x)))


@triton.jit
def sigmoid_activation(x):
    u = tl.exp2(-tl.abs(x))
    return quotient(tl.where(x > 0, 1.0, u), u + 1.0)


@triton.jit
def sigmoid_finish(shift, sum, s):
    return sum + softplus(-s), tl.full(sum.shape, 1.0, tl.float64), -1 / (1 + tl.exp(s))


class Epilogue(NamedTuple):
    fold: Any
    activation: Any
    finish: Any
    # Little enough for weights of the widest tile without spilling.
    is_light: bool = False


EPILOGUES = {
    "softmax": Epilogue(softmax_fold, softmax_fold, softmax_finish, is_light=True),
    "sigmoid": Epilogue(sigmoid_fold, sigmoid_activation, sigmoid_finish),
}


def epilogue_of(name: str) -> Epilogue:
    """Raises ValueError for one that this engine does not have."""
    if name not in EPILOGUES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, EPILOGUES))}, got {name!r}")
    return EPILOGUES[name]
