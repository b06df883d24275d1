"""Every kind as functions, which the kernels take as compile-time arguments.

    fold(x)                 the term that a pair adds to the sums of its row and its column
    activation(x)           its weight dL/ds, up to the factor (a_i + b_j) of its row and column
    finish(shift, sum, s)   loss, coefficient and positive's weight of a line, in float64

x is the logit in log2 units, less the shift of all lines, or the shift or level of its own line
(`logits.py`); a kind without either has the shift 0. The kernels do the masking, the positives and
the sums. A new kind needs these functions, a kind with levels the first two, and an entry in
`KINDS`, besides its entry in `fastclip.kinds`; no kernel changes. The same functions in C++ are in
`csrc/kinds.h`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .constants import INTERPRETED, LN2, LOG2E

TINY = tl.constexpr(2.0**-1022)  # float64's least normal number


@triton.jit
def quotient(a, b):
    """Returns a / b for b between 1 and 2. There the card's reciprocal, a single instruction, is
    off by at most two units in the last place; a general division takes a dozen instructions."""
    if INTERPRETED:
        return a / b
    else:
        return libdevice.fast_dividef(a, b)


@triton.jit
def softmax_fold(x):
    return tl.exp2(x)


@triton.jit
def softplus(z):
    """Returns log(1 + e^z) in float64: 0 at -inf, the value of a line without negatives."""
    u = tl.exp(-tl.abs(z))
    w = 1 + u
    # The quotient restores what 1 + u has lost to rounding.
    log1p = tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1.0, w - 1)))
    return tl.where(z <= 0, 0.0, z) + log1p


@triton.jit
def softmax_finish(shift, sum, s):
    # log(1 + R / P), in the log domain: neither R nor P needs to be representable.
    z = (tl.log2(sum) + shift) * LN2 - s
    total = sum + tl.exp2(s * LOG2E - shift)
    # This matters only to a line without negatives whose positive underflows.
    total = tl.where(total < TINY, TINY, total)
    return softplus(z), 1 / total, -sum / total


@triton.jit
def log1p_unit(u):
    """Returns log(1 + u) for u in [0, 1], with a relative error of 5e-9 before rounding, also for
    small u."""
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
    # The maximum drops a NaN, but the other term keeps it.
    return tl.maximum(x, 0.0) * LN2 + log1p_unit(tl.exp2(-tl.abs(x)))


@triton.jit
def sigmoid_activation(x):
    u = tl.exp2(-tl.abs(x))
    return quotient(tl.where(x > 0, 1.0, u), u + 1.0)


@triton.jit
def sigmoid_finish(shift, sum, s):
    return sum + softplus(-s), tl.full(sum.shape, 1.0, tl.float64), -1 / (1 + tl.exp(s))


# The comparisons keep a NaN.
@triton.jit
def hinge_fold(x):
    return tl.where(x < 0, 0.0, x) * LN2


@triton.jit
def hinge_activation(x):
    return tl.where(x > 0, 1.0, tl.where(x <= 0, 0.0, x))


class DeviceFunctions(NamedTuple):
    """The functions of a kind."""

    fold: Any
    activation: Any
    finish: Any = None
    # True if it takes so few registers that the widest tile's weights do not spill.
    is_light: bool = False


KINDS = {
    "softmax": DeviceFunctions(softmax_fold, softmax_fold, softmax_finish, is_light=True),
    "sigmoid": DeviceFunctions(sigmoid_fold, sigmoid_activation, sigmoid_finish),
    "hinge": DeviceFunctions(hinge_fold, hinge_activation),
}


def functions_of(name: str) -> DeviceFunctions:
    """Returns the functions of a kind; raises ValueError if this engine has none of that name."""
    if name not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {name!r}")
    return KINDS[name]
