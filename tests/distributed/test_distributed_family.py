"""The losses of the family across ranks: values and gradients of one process on the whole batch.

The truth is the dense twin in float64. Worlds of two ranks are groups within the pool of four.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from support import family
from support.ranks import family as ranks
from support.ranks.family import FLOAT64, Spread, joined, of_one_process
from support.ranks.pools import pool_of
from support.ranks.processes import Ranks
from torch import Tensor

from fastclip import reference
from fastclip.loss import GlobalClipLoss

# Every function and every kind of option; a case's options are those of one process.
NAMES = (
    "both ways", "queue", "margin", "smoothing", "hardness", "labels", "false negatives",
    "positives by id", "positives by id alone", "supcon", "nt_xent", "nt_xent, decoupled",
    "ranking", "hardest", "hardest, rows", "distill", "distill, rows", "clip, ids",
    "siglip, positives",
)  # fmt: skip
EVEN, UNEVEN = {2: (5, 5), 4: (3, 3, 3, 3)}, {2: (3, 6), 4: (4, 0, 6, 5)}


def spreads() -> list[Spread]:
    """Cases of both worlds, exchanges and shapes. Reductions and normalisation rotate."""
    found = []
    every = product(NAMES, (2, 4), (False, True), (False, True))
    for k, (name, size, ring, uneven) in enumerate(every):
        if (k + k // 8) % 2:  # half of them; each name has four, with each value of each option
            continue
        sizes = (UNEVEN if uneven else EVEN)[size]
        reduction = ("mean", "none", "sum")[(k // 2 + k // 8) % 3]
        found.append(Spread(name, sizes, ring, uneven, reduction, bool((k // 4) % 2)))
    return found


def modules() -> list[Spread]:
    names = ("positives by id", "supcon", "nt_xent", "hardest", "ranking, rows")
    return [
        Spread(name, UNEVEN[4] if k % 2 else EVEN[4], bool(k % 3), bool(k % 2), module=True)
        for k, name in enumerate(names)
    ]


def test_ranks_equal_one_process(four: Ranks) -> None:
    wrong = []
    every = [*spreads(), *modules()]
    for spread, found in zip(every, zip(*four.run(ranks.run, every), strict=True), strict=True):
        (value, gradients), (right, exact) = joined(spread, found), of_one_process(spread)
        for name, mine, true in (
            ("value", value, right), *((n, gradients[n], exact[n]) for n in exact)
        ):  # fmt: skip
            mine, true = (torch.zeros(()) if t is None else t for t in (mine, true))
            mistake = float((mine - true).norm() / true.norm().clamp_min(1e-6))
            if not mistake <= 1e-10:
                wrong.append(f"{spread} {name}: {mistake:.1e}")
    assert not wrong, f"{len(wrong)}\n" + "\n".join(wrong[:20])


def test_an_input_that_one_rank_freezes(two: Ranks) -> None:
    """The other gradients stay, and no rank waits for one that does not take part."""
    names = [n for n in NAMES if len(ranks.CASES[n].leaves) > 1]
    every = [
        Spread(name, EVEN[2], bool(k % 2), frozen_on_one=side)
        for k, (name, side) in enumerate(product(names, ("x", "y", "scale")))
        if side in ranks.CASES[name].leaves
    ]
    for spread, found in zip(every, zip(*two.run(ranks.run, every), strict=True), strict=True):
        (_, gradients), (_, exact) = joined(spread, found), of_one_process(spread)
        for name, true in exact.items():
            mine = gradients[name]
            if name == spread.frozen_on_one:
                if name == "scale":
                    continue
                mine, true = (t[spread.sizes[0] :] for t in (mine, true))
            torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-11, msg=f"{spread} {name}")


@pytest.fixture(scope="module")
def of_classes() -> list[dict[str, tuple[list[float], list[Tensor]]]]:
    return pool_of(4).run(ranks.classes, 3)


CLASSES = [
    f"{name} {local} {grad}"
    for name, local, grad in product(("distill", "ignore", "positive"), (False, True),
                                     (False, True))
    if name == "distill" or grad or not local
] + [f"siglip {impl}" for impl in ("bidir", "shift", "reduce", "gather")]  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_open_clip(of_classes: list[dict], name: str) -> None:
    """Values and effective gradients are those of the table in `fastclip.distributed`."""
    kind, *combination = name.split()
    spread = Spread("clip, ids", (3,) * 4)
    t = family.tensors(spread.case, spread.arrays(), FLOAT64, ranks.CPU)
    features, ids = (t["x"], t["y"], t["scale"]), (t["x_ids"], t["y_ids"])
    if kind == "distill":
        teacher = t["teacher_x"], t["teacher_y"], 2.0
        values = reference.clip_loss(*features), reference.distill_loss(*features, *teacher)
    elif kind == "siglip":
        options = {"ids": ids, "same_id": "positive", "weights": t["weights"]}
        values = (reference.siglip_loss(*features, -1.0, **options),)
    else:
        weights = t["weights"] if kind == "positive" else None
        options = {"ids": ids, "same_id": kind, "label_smoothing": 0.1, "weights": weights}
        values = (reference.clip_loss(*features, **options),)
    total = sum((k + 1) * value for k, value in enumerate(values))
    exact = torch.autograd.grad(total, features)
    found = [one[name] for one in of_classes]
    for k, value in enumerate(values):
        of_ranks = [of_values[k] for of_values, _ in found]
        assert sum(of_ranks) / 4 == pytest.approx(value.item(), rel=1e-10)
        if combination and combination[0] == "False":
            assert of_ranks == pytest.approx([value.item()] * 4, rel=1e-10)
    x, y = (torch.cat([of[1][k] for of in found]) / 4 for k in range(2))
    scale = sum(of[1][2] for of in found) / 4
    if combination == ["True", "False"]:
        assert (x - exact[0]).norm() > 1e-3 * exact[0].norm()
        return
    share = 1 / 4 if combination == ["False", "False"] else 1.0
    for mine, true in ((x, exact[0]), (y, exact[1])):
        torch.testing.assert_close(mine, share * true, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(scale, exact[2], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("sizes", "shared", "rho"),
    [((3, 3, 3, 3), True, None), ((3, 3, 3, 3), False, 6.5), ((4, 0, 2, 3), True, 6.5)],
)
def test_the_global_loss(
    four: Ranks, sizes: tuple[int, ...], shared: bool, rho: float | None
) -> None:
    found = four.run(ranks.global_loss, sizes, shared, rho)
    n = sum(sizes)
    whole = GlobalClipLoss(2 * n, 0.6, rho=rho, eps=1e-3, normalize=True).double()
    for step in range(3):
        x, y, scale, indices = ranks.global_batch(n, step, 2 * n, shared)
        leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
        value = whole(*leaves, indices)
        exact = torch.autograd.grad(value, leaves[: 2 + (rho is not None)])
        values, gradients, averages = zip(*(of_rank[step] for of_rank in found), strict=True)
        torch.testing.assert_close(sum(values) / 4, value.detach(), rtol=1e-11, atol=0)
        for k, true in enumerate(exact):
            parts = [of[k] for of in gradients]
            mine = sum(parts) if true.dim() == 0 else torch.cat(parts)
            torch.testing.assert_close(mine / 4, true, rtol=1e-9, atol=1e-12)
        start = 0
        for rank, of_rank in enumerate(averages):
            own = indices if shared else indices[start : start + sizes[rank]]
            start += sizes[rank]
            for mine, true in zip(of_rank, (whole.log_u_images, whole.log_u_texts), strict=True):
                torch.testing.assert_close(mine[own], true[own], rtol=1e-11, atol=0)
                assert (mine.isfinite().sum() == len(own)) or shared


def test_one_graph_holds_a_loss_across_ranks(two: Ranks) -> None:
    spreads = [Spread("nt_xent", (4, 4), ring=True), Spread("ranking", (4, 4))]
    for found in two.run(ranks.compiled, spreads):
        for spread, (graphs, mistake) in zip(spreads, found, strict=True):
            assert graphs <= 2 and mistake < 1e-12, spread


Given = list[tuple[str, dict[str, Any]]]


def differing(name: str, **options: Any) -> Given:
    return [(name, {}), (name, options)]


REFUSED: dict[str, Given] = {
    "an option": differing("margin", margin=-float("inf")),
    "options that exclude each other": differing("margin", label_smoothing=0.1),
    "a reduction": differing("supcon", reduction="median"),
    "an unknown reduction of clip": differing("clip, ids", reduction="median"),
    "features": differing("supcon", x=[[1.0]]),
    "features beside labels": differing("labels", x=[[1.0]], y=[[1.0]]),
    "views of two shapes": differing("nt_xent", y=torch.ones(3, 6, dtype=torch.float64)),
    "weights": differing("nt_xent", weights=torch.ones(3)),
    "a margin of hinges": differing("ranking", margin=-1.0),
    "ids of hinges": differing("hardest", ids=(torch.arange(3), torch.arange(3))),
    "a teacher": differing("distill", weights=torch.ones(4, dtype=torch.int64)),
    "weights with a gradient": differing("supcon", weights=torch.ones(4, requires_grad=True)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_argument_refused_on_one_rank_fails_on_all(two: Ranks, what: str) -> None:
    good, bad = two.run(ranks.errors, REFUSED[what])
    assert "all ranks must have arguments that the loss accepts, got others on rank 1" in good
    assert bad.startswith(("ValueError", "TypeError")) and "all ranks" not in bad, bad


DIFFERENT: dict[str, Given] = {
    "margins": differing("margin", margin=0.3),
    "reductions": differing("nt_xent", reduction="sum"),
    "decoupled": differing("supcon", decoupled=True),
    "weights": differing("nt_xent", weights=torch.ones(4, dtype=torch.float64)),
    "losses": [("nt_xent", {}), ("info_nce", {})],
    "hinges": differing("ranking", margin=0.4),
    "hardest": differing("ranking", hardest=True),
    "margins of the hardest": differing("hardest", margin=0.1),
    "a direction": differing("distill", symmetric=False),
    "a smoothing": differing("clip, ids", label_smoothing=0.3),
    "a reduction of clip": differing("clip, ids", reduction="sum"),
    "exchanges": differing("supcon", ring=True),
    "normalisation": differing("nt_xent", normalize=True),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_differing_options_are_an_error_on_every_rank(two: Ranks, what: str) -> None:
    for error in two.run(ranks.errors, DIFFERENT[what]):
        call = "call one loss, got rank 0: nt_xent_loss, rank 1: info_nce"
        rule = call if what == "losses" else "have one "
        assert error.startswith(f"ValueError: all ranks must {rule}"), error


def test_global_losses_that_differ(two: Ranks) -> None:
    for found in two.run(ranks.differing_modules):
        for option, error in zip(("training", "data_size", "averages"), found, strict=True):
            assert error.startswith(f"ValueError: all ranks must have one {option}, got"), error


def test_modules_that_are_wrong_on_one_rank(two: Ranks) -> None:
    good, bad = two.run(ranks.module_errors)
    for one, other in zip(good, bad, strict=True):
        assert "got others on rank 1" in one, one
        assert other.startswith("ValueError") and "got others" not in other, other
