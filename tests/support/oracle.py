"""The truth the tests judge by: both losses and all their gradients, written from the formulas.

NumPy alone: no autograd and nothing of fastclip, so that no mistake can be shared. It is dense and
slow, and never used by the library.

Positives are kept apart from negatives. The textbook form, `logsumexp_j(s_ij) - s_ii` with weights
`softmax - 1`, loses everything in float64 too once a loss falls below 1e-16; here a row's cross
entropy is `log(1 + R/P) = softplus(log R - log P)`, where `R` sums the negatives of the row and `P`
is its positive, and the positive's weight is `-R/(R + P)`: nothing is subtracted.

Letters: `x (N, D)`, `y (N, D)`, `s_ij = scale <x_i, y_j> + bias`, `w_ij = dL/ds_ij`, `g_i` what
flows into the loss of pair `i`.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

try:
    from ml_dtypes import bfloat16
except ImportError:  # not everywhere that the tests run: then torch rounds
    bfloat16 = None

NORM_EPS = 1e-12
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Truth:
    """A loss, its gradients, and how strongly each of them answers to a rounding error.

    A condition is the quantity summed from absolute values over the quantity itself. With unit
    roundoff `u`, a careful computation errs relatively by a few `u * (1 + largest_logit) *
    condition`, and no computation in that arithmetic can promise less.
    """

    loss: NDArray  # 0-dim, or (N,) without reduction
    dx: NDArray  # (N, D)
    dy: NDArray  # (N, D)
    dscale: NDArray  # 0-dim
    dbias: NDArray  # 0-dim
    conditions: dict[str, float]
    largest_logit: float  # a bound: |scale| max|x| max|y| + |bias|


def rounded(values: ArrayLike, dtype: str) -> NDArray:
    """`values` as a tensor of `dtype` holds them, in float64."""
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
    """CLIP's loss; `upstream` is the gradient of what `reduction` returns: 0-dim, or (N,) for none.

    `precision` is the type computed in: np.longdouble judges float64 results.
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
    # Each row's weights add up to zero, and so do each column's.
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
    """SigLIP's loss; arguments as for `clip_truth`."""
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
    """The features that are multiplied, their products, and dL/d(loss of pair i), (N,)."""
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
    """Row by row and without the diagonal; -inf where there are no negatives."""
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
        # The norm's projection removes a part: what is left may be small against what was summed.
        "dx": _ratio(abs(scale) * (weight @ np.abs(yhat)), dx * _norms(x) if normalize else dx),
        "dy": _ratio(abs(scale) * (weight.T @ np.abs(xhat)), dy * _norms(y) if normalize else dy),
        "dscale": _ratio((weight * size).sum(), dscale),
        "dbias": _ratio(weight.sum(), dbias),
    }
    bound = abs(scale) * np.linalg.norm(xhat.astype(float), axis=1).max()
    bound = float(bound * np.linalg.norm(yhat.astype(float), axis=1).max() + abs(bias))
    return Truth(loss, dx, dy, dscale, dbias, conditions, bound)


def _ratio(size: NDArray, result: NDArray) -> float:
    """|size| / |result| in the Frobenius norm; 1 where both are 0, inf where only `result` is."""
    size, result = (float(np.sqrt((np.asarray(t) ** 2).sum())) for t in (size, result))
    return size / result if result else (np.inf if size else 1.0)


def _through_norm(dhat: NDArray, raw: NDArray, hat: NDArray) -> NDArray:
    """Gradient of the raw features: the part along the feature is projected out, unless the norm
    lies below the epsilon and the division is by a constant."""
    lengths = np.sqrt((raw * raw).sum(1, keepdims=True))
    along = np.where(lengths > NORM_EPS, (dhat * hat).sum(1, keepdims=True), 0)
    return (dhat - along * hat) / np.maximum(lengths, NORM_EPS)
