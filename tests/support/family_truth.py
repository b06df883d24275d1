"""The truth of the losses of the family: values and gradients from formulas, in float64.

It uses NumPy alone. A loss is a formula of line statistics; here are its value and its derivative
with respect to each statistic, and the oracle of statistics turns these into gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from support.family import TEACHER_SCALE, Arrays, Case
from support.family_oracle import ExactBeside
from support.oracle import _sigmoid, _softplus
from support.statistics_oracle import Problem


@dataclass
class Lines:
    """The losses of lines (M), and what they depend on.

    size: the sum of the absolute terms of a loss, in proportion to which its error grows.
    of: the derivative with respect to the line's value of each statistic, by name.
    of_scale: the derivative with respect to the scale, other than through logits.
    """

    losses: NDArray
    size: NDArray
    of: dict[str, NDArray] = field(default_factory=dict)
    of_scale: NDArray | float = 0.0
    counts: NDArray | None = None


def _cross_entropies(
    case: Case, side: str, s: dict[str, NDArray], own: NDArray | None, scale: float
) -> Lines:
    """The cross-entropies of rows or columns with their positives."""
    margin, smoothing = case.option("margin", 0.0), case.option("label_smoothing", 0.0)
    decoupled, negatives = case.option("decoupled", False), s[f"{side}s"]
    if f"{side}_positives" not in s:
        gap = negatives - (own - scale * margin)
        if decoupled:
            found = Lines(gap, np.abs(negatives) + np.abs(own))
            of_gap = np.ones_like(gap)
        else:
            found, of_gap = Lines(_softplus(gap), _softplus(gap)), _sigmoid(gap)
        found.of = {f"{side}s": of_gap, "positives": -of_gap}
        found.of_scale, positive, name = margin * of_gap, own, "positives"
    else:
        by_id, name = s[f"{side}_positives"] - scale * margin, f"{side}_positive_means"
        counts = np.isfinite(by_id)
        negatives, by_id, positive = (
            np.where(counts, t, 0) for t in (negatives, by_id, s[name] - scale * margin)
        )
        total = negatives if decoupled else np.logaddexp(negatives, by_id)
        found = Lines(total - positive, np.abs(total) + np.abs(positive), counts=counts)
        share = np.ones_like(total) if decoupled else np.exp(negatives - total)
        of_by_id = np.zeros_like(total) if decoupled else np.exp(by_id - total)
        found.of = {f"{side}s": share, f"{side}_positives": of_by_id, name: -np.ones_like(total)}
        found.of_scale = -margin * (of_by_id - 1)
    if smoothing:
        means = s[f"{side}_means"]
        found.losses = found.losses + smoothing * (positive - means)
        found.size = found.size + smoothing * (np.abs(positive) + np.abs(means))
        found.of[name] = found.of[name] + smoothing
        found.of[f"{side}_means"] = np.full_like(means, -smoothing)
    if found.counts is not None:
        for part in (found.losses, found.size, *found.of.values()):
            part[~found.counts] = 0
        found.of_scale = np.where(found.counts, found.of_scale, 0)
    return found


def _halves(a: Lines, b: Lines) -> Lines:
    """The mean of two losses of each line."""
    of = {name: (a.of.get(name, 0) + b.of.get(name, 0)) / 2 for name in {**a.of, **b.of}}
    return Lines(
        (a.losses + b.losses) / 2, (a.size + b.size) / 2, of, (a.of_scale + b.of_scale) / 2,
        a.counts,
    )  # fmt: skip


@dataclass
class Block:
    """A block of logits with the sides that it is made of, and a factor of its gradients."""

    exact: ExactBeside
    sides: tuple[str, str | None]
    columns: slice  # those of the lines, in order
    factor: float = 1.0


def _problem(case: Case, a: Arrays, normalize: bool, **options: Any) -> Problem:
    given = {
        "ids": (a["x_ids"], a["y_ids"]) if "ids" in case.given else None,
        "labels": a["labels"] if "labels" in case.given else None,
        "key_bias": a["key_bias"] if "key_bias" in case.given else None,
        "scale": float(a["scale"]), "normalize": normalize,
    }  # fmt: skip
    return Problem(a["x"], a["y"], **given | options)


def _info_nce(case: Case, a: Arrays, normalize: bool) -> tuple[Lines, list[Block]]:
    m, scale, hardness = len(a["x"]), float(a["scale"]), case.option("hardness", 0.0)
    symmetric = case.option("symmetric", case.loss == "clip_loss")
    offset = case.option("offset", 0)
    exact = ExactBeside(_problem(
        case, a, normalize, scale=scale + hardness, offset=offset,
        same_id=case.option("same_id", "ignore"), margin=case.option("false_negative_margin"),
        means=True,
    ))  # fmt: skip
    s = exact.statistics()
    own = s["positives"]
    if hardness:
        own = own - hardness * np.where(exact.own, exact.t, 0).sum(1)
    columns = slice(offset or 0, (offset or 0) + m)
    found = _cross_entropies(case, "row", s, own, scale)
    if symmetric:
        of_pairs = {name: t[columns] if "column" in name else t for name, t in s.items()}
        found = _halves(found, _cross_entropies(case, "column", of_pairs, own, scale))
    return found, [Block(exact, ("x", "y"), columns, scale / (scale + hardness or 1.0))]


def _supcon(case: Case, a: Arrays, normalize: bool) -> tuple[Lines, list[Block]]:
    exact = ExactBeside(Problem(
        a["x"], None, float(a["scale"]), ids=(a["classes"],) * 2, same_id="positive", means=True,
        normalize=normalize,
    ))  # fmt: skip
    found = _cross_entropies(case, "row", exact.statistics(), None, float(a["scale"]))
    return found, [Block(exact, ("x", None), slice(None))]


def _nt_xent(case: Case, a: Arrays, normalize: bool) -> tuple[Lines, list[Block]]:
    common = {"scale": float(a["scale"]), "normalize": normalize}
    between = ExactBeside(Problem(a["x"], a["y"], **common))
    blocks, s, views = [Block(between, ("x", "y"), slice(None))], between.statistics(), []
    for k, (name, side) in enumerate((("x", "row"), ("y", "column"))):
        within = ExactBeside(Problem(a[name], None, **common))
        blocks.append(Block(within, (name, None), slice(None)))
        others, own = s[f"{side}s"], within.statistics()["rows"]
        every = np.logaddexp(others, own)
        found = _cross_entropies(case, side, {f"{side}s": every}, s["positives"], 0.0)
        g = found.of.pop(f"{side}s")
        with np.errstate(invalid="ignore"):
            found.of |= {
                f"{side}s": g * np.nan_to_num(np.exp(others - every)),
                f"within {k}": g * np.nan_to_num(np.exp(own - every)),
            }
        views.append(found)
    return _halves(*views), blocks


def _ranking(case: Case, a: Arrays, normalize: bool) -> tuple[Lines, list[Block]]:
    kind = "hardest" if case.option("hardest") else "hinge"
    exact = ExactBeside(
        _problem(case, a, normalize, scale=1.0, kind=kind), above=-case.option("margin", 0.2)
    )
    s = exact.statistics()
    names = ("rows", "columns") if case.option("symmetric", True) else ("rows",)
    losses = sum(s[name] for name in names)
    # A hinge has the error of a similarity, whatever its size.
    size = losses + (losses > 0) * len(a["y"])
    return (
        Lines(losses, size, {name: np.ones_like(losses) for name in names}),
        [Block(exact, ("x", "y"), slice(None))],
    )


def _distill(case: Case, a: Arrays, normalize: bool) -> tuple[Lines, list[Block]]:
    teacher = (a["teacher_x"], a["teacher_y"], TEACHER_SCALE)
    exact = ExactBeside(_problem(case, a, normalize, offset=None), targets=teacher)
    s, found = exact.statistics(), []
    for side in ("row", "column")[: 1 + case.option("symmetric", True)]:
        expected = s[f"{side}_expectations"]
        one = np.ones_like(expected)
        losses, size = s[f"{side}s"] - expected, np.abs(s[f"{side}s"]) + np.abs(expected)
        found.append(Lines(losses, size, {f"{side}s": one, f"{side}_expectations": -one}))
    lines = _halves(*found) if len(found) == 2 else found[0]
    return lines, [Block(exact, ("x", "y"), slice(None))]


def _siglip(case: Case, a: Arrays, normalize: bool) -> tuple[Lines, list[Block]]:
    same_id = case.option("same_id", "ignore")
    exact = ExactBeside(_problem(
        case, a, normalize, bias=float(a["bias"]), kind="sigmoid", same_id=same_id
    ))  # fmt: skip
    s = exact.statistics()
    half = np.full(len(a["x"]), 0.5)
    losses, of = (s["rows"] + s["columns"]) / 2, {"rows": half, "columns": half}
    if same_id == "positive":
        losses = losses + (s["row_positives"] + s["column_positives"]) / 2
        of |= {"row_positives": half, "column_positives": half}
    else:
        losses = losses + _softplus(-s["positives"])
        of |= {"positives": -_sigmoid(-s["positives"])}
    return Lines(losses, losses, of), [Block(exact, ("x", "y"), slice(None))]


FORMULAS = {
    "info_nce": _info_nce, "clip_loss": _info_nce, "siglip_loss": _siglip,
    "supcon_loss": _supcon, "nt_xent_loss": _nt_xent, "ranking_loss": _ranking,
    "distill_loss": _distill,
}  # fmt: skip


def truth(
    case: Case, a: Arrays, *, normalize: bool = False, reduction: str = "mean",
    upstream: ArrayLike = 1.0,
) -> SimpleNamespace:  # fmt: skip
    """Returns the loss and the gradients of `family.evaluate`, their conditions and the largest
    logit, as `judge.allowance` takes them."""
    lines, blocks = FORMULAS[case.loss](case, a, normalize)
    counts = np.ones_like(lines.losses) if lines.counts is None else lines.counts.astype(float)
    weights = (a["weights"] if "weights" in case.given else 1.0) * counts
    number = weights.sum() or 1.0
    losses, sizes = lines.losses * weights, lines.size * weights
    g = np.broadcast_to(np.asarray(upstream, float), losses.shape)
    of_weights, size_of_weights = g * lines.losses * counts, np.abs(g) * lines.size * counts
    if reduction == "mean":
        value, size = losses.sum() / number, sizes.sum() / number
        of_weights = g * counts * (lines.losses - value) / number
        size_of_weights = np.abs(g) * counts * (lines.size + size) / number
        g = g / number
    elif reduction == "sum":
        value, size = losses.sum(), sizes.sum()
    else:
        value, size = losses, sizes
    g = g * weights
    results, bounds = {"loss": np.asarray(value)}, {"loss": size}
    results["dweights"], bounds["dweights"] = of_weights, size_of_weights
    direct = lines.of_scale * g
    totals = {"dscale": (np.sum(direct), np.sum(np.abs(direct)))}
    for number_of_block, block in enumerate(blocks):
        _add(totals, block, _upstream(lines, g, block, number_of_block))
    for name, (result, bound) in totals.items():
        results[name], bounds[name] = np.asarray(result), bound
    if case.loss == "clip_loss":
        results["dbias"], bounds["dbias"] = np.zeros(()), 1.0
    conditions = {name: _condition(bounds[name], results[name]) for name in results}
    largest = max(block.exact.largest_logit for block in blocks)
    return SimpleNamespace(**results, conditions=conditions, largest_logit=largest)


def _upstream(lines: Lines, g: NDArray, block: Block, number: int) -> dict[str, NDArray]:
    """The upstream gradients of a block's statistics. Blocks after the first are of one side with
    itself."""
    if number:
        return {"rows": g * lines.of[f"within {number - 1}"]}
    found = {}
    for name, of in lines.of.items():
        if name.startswith("within"):
            continue
        found[name] = g * of
        if name.startswith("column"):
            found[name] = np.zeros(block.exact.t.shape[1])
            found[name][block.columns] = g * of
    return found


def _add(totals: dict[str, Any], block: Block, upstream: dict[str, NDArray]) -> None:
    """Adds a block's gradients and the sizes of their terms."""
    found = block.exact.gradients(upstream)
    for name in ("dx", "dy", "dscale", "dbias", "dkey_bias"):
        result = getattr(found, name)
        if result is None:
            continue
        factor = block.factor if name in ("dx", "dy") else 1.0
        length = np.linalg.norm(result)
        bound = found.conditions[name] * (length or 1.0)
        name = f"d{block.sides[0]}" if name == "dx" else name
        before, size = totals.get(name, (0.0, 0.0))
        totals[name] = before + factor * result, size + abs(factor) * bound


def _condition(bound: ArrayLike, result: NDArray) -> float:
    bound, length = float(np.linalg.norm(bound)), float(np.linalg.norm(result))
    return bound / length if length else max(bound, 1.0)
