"""Every loss once, as three functions that the kernels take as compile-time arguments.

    fold(t, k, m)        what a negative adds to the sum that its row and its column remember
    activation(t, k, m)  its weight dL/ds up to the factor (a_i + b_j) of its row and column
    finish(reference, sum, s)   loss, coefficient and positive's weight of a line, in float64

t is `<x_i, y_j>` with the factors of both towers, k the logit in log2 units as a map of t (see
`affine`), m the reference of all lines or of each. Masking, positives and sums are the kernels'.
A new loss is three such functions and an `Epilogue`; no kernel changes. The same functions in C++:
`csrc/epilogues.h`.
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
def fma(a, b, c):
    # The interpreter's tl.fma rounds twice. A product of two floats is exact in float64.
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def quotient(a, b):
    """a / b for b between 1 and 2: there the card's reciprocal, an instruction, is off by two units
    in the last place at most. A division of any two floats takes a dozen."""
    if INTERPRETED:
        return a / b
    else:
        return libdevice.fast_dividef(a, b)


@triton.jit
def affine(SCALE, BIAS):
    """scale and bias in log2 units, each as a float and what the float leaves of it.

    Rounding the scale alone would cost 2^-24 relative: at a logit of 144 (scale 100) an error of
    6e-6 in the exponential.
    """
    scale = tl.load(SCALE).to(tl.float64) * LOG2E
    bias = tl.zeros((), tl.float64)
    if BIAS is not None:
        bias = tl.load(BIAS).to(tl.float64) * LOG2E
    high = scale.to(tl.float32)
    bias_high = bias.to(tl.float32)
    low = (scale - high.to(tl.float64)).to(tl.float32)
    bias_low = (bias - bias_high.to(tl.float64)).to(tl.float32)
    return high, low, bias_high, bias_low


@triton.jit
def logit(t, k):
    high, low, bias, bias_low = k
    return fma(t, high, bias) + fma(t, low, bias_low)


@triton.jit
def softmax_fold(t, k, m):
    # m is integral and subtracted within the first rounding: the error is 2^-24 of the distance
    # from the reference, not of the logit.
    high, low, _, _ = k
    return tl.exp2(fma(t, low, fma(t, high, -m)))


@triton.jit
def softplus(z):
    """log(1 + e^z) in float64; at -inf, a line without negatives, 0."""
    u = tl.exp(-tl.abs(z))
    w = 1 + u
    # What rounding 1 + u has lost, the quotient gives back.
    log1p = tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1.0, w - 1)))
    return tl.where(z <= 0, 0.0, z) + log1p


@triton.jit
def softmax_finish(reference, sum, s):
    # log(1 + R / P), in the log domain: neither R nor P needs to be representable.
    z = (tl.log2(sum) + reference) * LN2 - s
    total = sum + tl.exp2(s * LOG2E - reference)
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
def sigmoid_fold(t, k, m):
    x = logit(t, k)
    # The maximum loses a NaN, the other term keeps it.
    return tl.maximum(x, 0.0) * LN2 + log1p_unit(tl.exp2(-tl.abs(x)))


@triton.jit
def sigmoid_activation(t, k, m):
    x = logit(t, k)
    u = tl.exp2(-tl.abs(x))
    return quotient(tl.where(x > 0, 1.0, u), u + 1.0)


@triton.jit
def sigmoid_finish(reference, sum, s):
    return sum + softplus(-s), tl.full(sum.shape, 1.0, tl.float64), -1 / (1 + tl.exp(s))


class Epilogue(NamedTuple):
    fold: Any
    activation: Any
    finish: Any
    # Weights depend on the finished state, and lines have references; else neither.
    needs_state: bool
    uses_bias: bool
    # Little enough for weights of the widest tile without spilling.
    is_light: bool


EPILOGUES = {
    # A bias shifts all logits of a line alike and cancels.
    "softmax": Epilogue(
        softmax_fold, softmax_fold, softmax_finish, needs_state=True, uses_bias=False, is_light=True
    ),
    "sigmoid": Epilogue(
        sigmoid_fold,
        sigmoid_activation,
        sigmoid_finish,
        needs_state=False,
        uses_bias=True,
        is_light=False,
    ),
}
