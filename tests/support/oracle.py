"""The oracle: both losses and all their gradients, written from the formulas.

It uses only NumPy, no autograd and nothing of fastclip, so that it cannot share their mistakes. It
is dense and slow, and the library never uses it.

Positives are kept apart from negatives. The textbook form, `logsumexp_j(s_ij) - s_ii` with weights
`softmax - 1`, loses all digits even in float64 once a loss falls below 1e-16. Here a row's cross
entropy is `log(1 + R/P) = softplus(log R - log P)`, where `R` is the sum of exponentials of the
row's negatives and `P` the exponential of its positive. The positive's weight is `-R/(R + P)`, so
nothing is subtracted.

Letters: `x (N, D)`, `y (N, D)`, `s_ij = scale <x_i, y_j> + bias`, `w_ij = dL/ds_ij`, and `g_i` is
the upstream gradient of the loss of pair `i`.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

try:
    from ml_dtypes import bfloat16
except ImportError:  # optional: without it torch rounds
    bfloat16 = None

NORM_EPS = 1e-12
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Truth:
    """A loss, its gradients, and their condition: the sensitivity of each to rounding errors.

    A condition is the sum of a quantity's absolute terms divided by the quantity. With unit
    roundoff `u`, a careful computation has a relative error of a few `u * (1 + largest_logit) *
    condition`, and no computation in that arithmetic can guarantee less.
    """

    loss: NDArray  # 0-dim, or (N,) without reduction
    dx: NDArray  # (N, D)
    dy: NDArray  # (N, D)
    dscale: NDArray  # 0-dim
    dbias: NDArray  # 0-dim
    conditions: dict[str, float]
    largest_logit: float  # a bound: |scale| max|x| max|y| + |bias|


def rounded(values: ArrayLike, dtype: str) -> NDArray:
    """Returns `values` in float64, rounded to `dtype`."""
    values = np.asarray(values, np.float64)
    if dtype == "bfloat16" and bfloat16 is None:
        return torch.from_numpy(values).bfloat16().double().numpy()
    with np.errstate(over="ignore"):
        return values.astype(bfloat16 if dtype == "bfloat16" else dtype).astype(np.float64)


def clip_truth(
    x: NDArray,  # (N, D)
    y: NDArray,  # (N, D)
    scale: float,
    bias: float = 0.0,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    upstream: ArrayLike = 1.0,
    precision: type = np.float64,
) -> Truth:
    """Returns CLIP's loss and gradients.

    `upstream` is the gradient of the reduced loss: 0-dim, or (N,) without reduction. `precision` is
    the type to compute in: np.longdouble judges float64 results.
    """
    xhat, yhat, cosines, g = _prepared(x, y, normalize, reduction, upstream, precision)
    logits = precision(scale) * cosines
    positives = np.diag(logits)
    loss, weights = np.zeros(len(x), precision), np.zeros_like(logits)
    for s, w in ((logits, weights), (logits.T, weights.T)):  # rows, then columns
        surplus = _log_sum_exp_of_negatives(s) - positives  # log(R / P)
        loss += _softplus(surplus) / 2
        negatives = np.exp(s - (positives + _softplus(surplus))[:, None])  # e_ij / (R + P)
        np.fill_diagonal(negatives, -_sigmoid(surplus))  # -R / (R + P)
        w += negatives * (g / 2)[:, None]
    exact = _gradients(
        _reduced(loss, reduction), weights, xhat, yhat, cosines, x, y, scale, 0.0, normalize
    )
    # The weights of each row and of each column add up to zero.
    return replace(exact, dbias=np.zeros((), precision), conditions=exact.conditions | {"dbias": 1})


def siglip_truth(
    x: NDArray,  # (N, D)
    y: NDArray,  # (N, D)
    scale: float,
    bias: float = 0.0,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    upstream: ArrayLike = 1.0,
    precision: type = np.float64,
) -> Truth:
    """Returns SigLIP's loss and gradients; the arguments are those of `clip_truth`."""
    xhat, yhat, cosines, g = _prepared(x, y, normalize, reduction, upstream, precision)
    logits = precision(scale) * cosines + precision(bias)
    positives = np.diag(logits)
    negatives = _softplus(logits)
    np.fill_diagonal(negatives, 0)
    loss = _softplus(-positives) + (negatives.sum(1) + negatives.sum(0)) / 2
    weights = _sigmoid(logits) * (g[:, None] + g[None, :]) / 2
    np.fill_diagonal(weights, -g * _sigmoid(-positives))
    return _gradients(
        _reduced(loss, reduction), weights, xhat, yhat, cosines, x, y, scale, bias, normalize
    )


TRUTHS = {"clip": clip_truth, "siglip": siglip_truth}


def _prepared(
    x: NDArray,
    y: NDArray,
    normalize: bool,
    reduction: str,
    upstream: ArrayLike,
    precision: type,
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Returns the features to multiply, their products, and dL/d(loss of pair i), (N,)."""
    x, y = np.asarray(x, precision), np.asarray(y, precision)
    if normalize:
        x, y = x / _norms(x), y / _norms(y)
    share = 1 / precision(len(x)) if reduction == "mean" else precision(1)
    g = np.broadcast_to(np.asarray(upstream, precision) * share, (len(x),))
    return x, y, x @ y.T, g


def _norms(x: NDArray) -> NDArray:
    return np.maximum(np.sqrt((x * x).sum(1, keepdims=True)), NORM_EPS)


def _reduced(loss: NDArray, reduction: str) -> NDArray:
    return {"none": np.asarray, "sum": np.sum, "mean": np.mean}[reduction](loss)


def _log_sum_exp_of_negatives(s: NDArray) -> NDArray:
    """Returns each row's log-sum-exp without the diagonal; -inf for a row without negatives."""
    s = s.copy()
    np.fill_diagonal(s, -np.inf)
    top = s.max(1)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return top + np.log(np.exp(s - top[:, None]).sum(1))


def _softplus(t: NDArray) -> NDArray:
    return np.maximum(t, 0) + np.log1p(np.exp(-np.abs(t)))


def _sigmoid(t: NDArray) -> NDArray:
    small = np.exp(-np.abs(t))
    return np.where(t >= 0, 1, small) / (1 + small)


def _gradients(
    loss: NDArray,
    w: NDArray,
    xhat: NDArray,
    yhat: NDArray,
    cosines: NDArray,
    x: NDArray,
    y: NDArray,
    scale: float,
    bias: float,
    normalize: bool,
) -> Truth:
    scale = w.dtype.type(scale)
    du, dv = scale * (w @ yhat), scale * (w.T @ xhat)
    dx = _through_norm(du, x, xhat) if normalize else du
    dy = _through_norm(dv, y, yhat) if normalize else dv
    dscale, dbias = (w * cosines).sum(), w.sum()
    size, weight = np.abs(xhat) @ np.abs(yhat).T, np.abs(w)
    conditions = {
        "loss": 1.0,
        # The norm's projection removes a part: the rest may be small beside the summed terms.
        "dx": _ratio(abs(scale) * (weight @ np.abs(yhat)), dx * _norms(x) if normalize else dx),
        "dy": _ratio(abs(scale) * (weight.T @ np.abs(xhat)), dy * _norms(y) if normalize else dy),
        "dscale": _ratio((weight * size).sum(), dscale),
        "dbias": _ratio(weight.sum(), dbias),
    }
    bound = abs(scale) * np.linalg.norm(xhat.astype(float), axis=1).max()
    bound = float(bound * np.linalg.norm(yhat.astype(float), axis=1).max() + abs(bias))
    return Truth(loss, dx, dy, dscale, dbias, conditions, bound)


def _ratio(size: NDArray, result: NDArray) -> float:
    """Returns |size| / |result| in the Frobenius norm; 1 if both are 0, inf if only `result` is."""
    size, result = (float(np.sqrt((np.asarray(t) ** 2).sum())) for t in (size, result))
    return size / result if result else (np.inf if size else 1.0)


def _through_norm(dhat: NDArray, raw: NDArray, hat: NDArray) -> NDArray:
    """Returns the gradient of the raw features.

    The part along the feature is projected out, unless the norm lies below epsilon: then features
    are divided by a constant.
    """
    lengths = np.sqrt((raw * raw).sum(1, keepdims=True))
    along = np.where(lengths > NORM_EPS, (dhat * hat).sum(1, keepdims=True), 0)
    return (dhat - along * hat) / np.maximum(lengths, NORM_EPS)
