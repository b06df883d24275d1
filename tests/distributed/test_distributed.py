"""Losses across ranks: after DDP's mean, gradients are those of one process on the whole batch.

On 1 to 4 ranks, with even and uneven batches, gathered and around the ring. The truth is the
oracle's; for open_clip's combinations it comes from open_clip's own classes.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from support.block_cases import compiled_only
from support.judge import PRECISIONS, allowance, error, truth
from support.open_clip_import import import_open_clip
from support.oracle import TRUTHS
from support.ranks.cases import (
    Case,
    Module,
    accumulated,
    each_module,
    emulated,
    leaves,
    module,
    ours,
    ours_and_kept,
    warnings_of,
)
from support.ranks.pools import pool_of
from support.ranks.processes import Ranks

WORLD_SIZES = (1, 2, 3, 4)
# Pairs of each rank. A rank with one pair has no negatives among its own.
EVEN = {1: (13,), 2: (9, 9), 3: (7, 7, 7), 4: (5, 5, 5, 5)}
UNEVEN = {1: (13,), 2: (11, 6), 3: (9, 1, 4), 4: (5, 8, 1, 3)}
MIXED = {1: (13,), 2: (11, 6), 3: (9, 3, 4), 4: (5, 8, 3, 7)}
QUANTITIES = ("loss", "dx", "dy", "dscale", "dbias")


@pytest.fixture(params=WORLD_SIZES, ids=lambda size: f"{size} ranks")
def ranks(request: pytest.FixtureRequest) -> Ranks:
    return pool_of(request.param)


def size_of(ranks: Ranks) -> int:
    return len(ranks.processes)


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' results, put together as one process's."""
    found = {name: results[0][name] for name in ("loss", "dscale", "dbias")}
    for name in ("dx", "dy"):
        parts = [result[name] for result in results]
        found[name] = None if parts[0] is None else np.concatenate(parts)
    return found


def mistakes(case: Case, found: dict[str, Any]) -> list[str]:
    """A message for each quantity whose error exceeds that of careful arithmetic."""
    precision = PRECISIONS[case.precision]
    x, y = case.towers
    exact = truth(case.loss, x, y, case.scale, -3.0, precision, normalize=case.normalize)
    wrong = []
    for name in QUANTITIES:
        if found[name] is None:
            continue
        dtype = {"dx": precision.x, "dy": precision.y}.get(name, precision.scalars)
        allowed = 4 * allowance(name, exact, precision, dtype) + 1e-15
        mistake = error(np.asarray(found[name]), np.asarray(getattr(exact, name), float))
        if not mistake <= allowed:
            wrong.append(f"{case} {name}: {mistake:.2e}, allowed {allowed:.2e}")
    return wrong


def run(ranks: Ranks, case: Case, **options: Any) -> dict[str, Any]:
    return joined(ranks.run(ours, case, options))


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("loss", TRUTHS)
def test_the_mean_over_ranks_equals_one_process(ranks: Ranks, loss: str, ring: bool) -> None:
    wrong = []
    for precision, sizes in product(("float64", "float32", "bfloat16"), (EVEN, UNEVEN)):
        for batch_name, scale, normalize in (
            ("random", 14.3, False), ("lengths", 14.3, True), ("separated", 100.0, False),
            ("dominating", 1e3, False),
        ):  # fmt: skip
            case = Case(loss, sizes[size_of(ranks)], precision, batch_name, scale, normalize)
            wrong += mistakes(case, run(ranks, case, ring=ring, uneven=sizes is UNEVEN))
    assert not wrong, "\n".join(wrong)


def test_float64_agrees_to_ten_digits(ranks: Ranks) -> None:
    for loss, ring in product(TRUTHS, (False, True)):
        case = Case(loss, UNEVEN[size_of(ranks)])
        found = run(ranks, case, ring=ring, uneven=True)
        exact = truth(loss, *case.towers, 14.3, -3.0, PRECISIONS["float64"])
        for name in QUANTITIES:
            assert error(np.asarray(found[name]), np.asarray(getattr(exact, name), float)) < 1e-10


def clip_shares(s: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (-s.log_softmax(1).diagonal() - s.log_softmax(0).diagonal()) / 2


def siglip_shares(s: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    signs = 2 * torch.eye(len(s), dtype=s.dtype) - 1
    return torch.nn.functional.softplus(-signs * (s + bias)).sum(1)


# Each pair's term in its rank's loss, from scaled similarities. SigLIP's is the sum of its row.
SHARES = {"clip": clip_shares, "siglip": siglip_shares}


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("loss", TRUTHS)
def test_ranks_may_scale_their_losses_differently(ranks: Ranks, loss: str, ring: bool) -> None:
    """The gradients of one process that sums the scaled shares. Factors may be zero or negative."""
    upstream = (3.0, -0.5, 0.0, 1e-3)[: size_of(ranks)]
    case = Case(loss, UNEVEN[size_of(ranks)], upstream=upstream)
    found = run(ranks, case, ring=ring, uneven=True)
    x, y, scale, bias = leaves(case, slice(None))
    shares = SHARES[loss](scale * x @ y.T, bias)
    factors = torch.tensor(upstream, dtype=x.dtype).repeat_interleave(torch.tensor(case.sizes))
    (shares * factors).sum().div(len(x)).backward()
    for name, leaf in zip(("dx", "dy", "dscale"), (x, y, scale), strict=True):
        exact = leaf.grad.numpy()
        assert error(np.asarray(found[name]), exact) < 1e-10, name


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("frozen", ["x", "y"])
def test_a_frozen_tower(ranks: Ranks, frozen: str, ring: bool) -> None:
    for loss in TRUTHS:
        case = Case(loss, EVEN[size_of(ranks)], frozen=frozen)
        found = run(ranks, case, ring=ring)
        assert found[f"d{frozen}"] is None and not mistakes(case, found)


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("loss", TRUTHS)
def test_live_slices_add_up(ranks: Ranks, loss: str, ring: bool) -> None:
    """Micro-batches sum to the whole batch. On uneven batches their sizes differ between ranks."""
    wrong = []
    for sizes, normalize in ((EVEN, False), (MIXED, True)):
        case = Case(loss, sizes[size_of(ranks)], batch_name="lengths", normalize=normalize)
        found = ranks.run(accumulated, case, {"ring": ring, "uneven": sizes is MIXED})
        wrong += mistakes(case, joined(found))
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def several(ranks: Ranks) -> Ranks:
    if size_of(ranks) == 1:
        pytest.skip("needs several ranks")
    return ranks


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("loss", TRUTHS)
def test_towers_frozen_on_single_ranks(several: Ranks, loss: str, ring: bool) -> None:
    """A frozen tower gets no gradient; all others get the same as if nothing were frozen."""
    last = size_of(several) - 1
    frozen = ((0, "x"), (last, "y"))
    case = Case(loss, UNEVEN[size_of(several)])
    options = {"ring": ring, "uneven": True}
    found, exact = (several.run(ours, c, options) for c in (case._replace(frozen_on=frozen), case))
    for rank, name in frozen:
        assert found[rank].pop(f"d{name}") is None
    for one, other in zip(found, exact, strict=True):
        for name, value in one.items():
            assert error(np.asarray(value), np.asarray(other[name])) < 1e-12, name


@compiled_only
@pytest.mark.parametrize(
    "loss, ring", [("clip", False), ("clip", True), ("siglip", True)],
    ids=["clip-gathered", "clip-ring", "siglip-ring"],
)  # fmt: skip
def test_visits_share_the_budget_of_kept_products(several: Ranks, loss: str, ring: bool) -> None:
    case = Case(loss, (48, 32, 64, 48)[: size_of(several)])
    budget = 24 << 10  # enough for some rows of every visit, or for most rows of one
    options = {"ring": ring, "uneven": True, "memory_budget": budget}
    found = several.run(ours_and_kept, case, options)
    assert not mistakes(case, joined([results for results, _ in found]))
    for _, kept in found:
        assert 0 < kept <= budget


# ---- open_clip's classes -------------------------------------------------------------------------

WAYS = list(product((False, True), (False, True)))


def modules_for(size: int) -> Iterator[Module]:
    """Every mode and precision, on even and uneven batches; in float64 also in slices, with ranks
    that scale their losses differently."""
    modes = [
        ("clip", {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "ring": ring})
        for (local_loss, gather_with_grad), ring in product(WAYS, (False, True))
    ]
    modes += [("siglip", {"dist_impl": name}) for name in ("bidir", "shift", "reduce", "gather")]
    for (loss, options), uneven in product(modes, (False, True)):
        options = {**options, "uneven": uneven}
        for precision in ("float64", "float32", "bfloat16"):
            yield Module(Case(loss, (UNEVEN if uneven else EVEN)[size], precision), options)
        # Exchanges take most of the time, so only few ranks slice even batches.
        if uneven or size <= 2:
            upstream = (2.0, 0.5, -1.0, 3.0)[:size]
            case = Case(loss, (MIXED if uneven else EVEN)[size], upstream=upstream)
            yield Module(case, options, sliced=True)


def test_modules_in_every_mode(ranks: Ranks) -> None:
    """Checks every rank's value, the gradients, and whether features come around a ring."""
    every, wrong = list(modules_for(size_of(ranks))), []
    by_module = zip(*ranks.run(each_module, every), strict=True)
    for one, found in zip(every, by_module, strict=True):
        case, precision = one.case, PRECISIONS[one.case.precision]
        expected = emulated(case, **one.combination)
        exact = truth(case.loss, *case.towers, case.scale, -3.0, precision)
        values = [np.array([rank["value"] for rank in each]) for each in (found, expected)]
        compared = {name: (joined(found)[name], joined(expected)[name]) for name in QUANTITIES}
        for name, (mine, true) in {**compared, "loss": values}.items():
            dtype = {"dx": precision.x, "dy": precision.y}.get(name, precision.scalars)
            allowed = max(4 * allowance(name, exact, precision, dtype), 1e-11)
            mistake = error(np.asarray(mine), np.asarray(true))
            if not mistake <= allowed:
                wrong.append(f"{one} {name}: {mistake:.2e}, allowed {allowed:.2e}")
        for rank in found:
            # Uneven batches are gathered from rank to rank.
            sends = (one.is_ring or one.options["uneven"]) and size_of(ranks) > 1
            if case.precision == "float64" and ("send" in rank["exchanges"]) != sends:
                wrong.append(f"{one}: {rank['exchanges']}")
    assert not wrong, "\n".join(wrong)


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], what: object) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in other.items():
            if value is not None and name != "dbias":
                np.testing.assert_allclose(mine[name], value, rtol=1e-9, atol=1e-12, err_msg=what)


@pytest.mark.filterwarnings("ignore:ClipLoss")
@pytest.mark.parametrize("local_loss, gather_with_grad", WAYS)
def test_every_combination_equals_open_clip(
    several: Ranks, local_loss: bool, gather_with_grad: bool
) -> None:
    """The value on every rank, and the gradients after the mean."""
    import_open_clip()
    options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    for upstream in (None, (2.0, 0.5, -1.0, 3.0)):
        case = Case("clip", EVEN[size_of(several)], upstream=upstream)
        one, other = (several.run(module, case, theirs, options) for theirs in (False, True))
        assert_same(one, other, str(options))


@pytest.mark.parametrize("dist_impl", ["bidir", "shift", "reduce", "gather"])
def test_every_exchange_equals_open_clip(several: Ranks, dist_impl: str) -> None:
    import_open_clip()
    case = Case("siglip", EVEN[size_of(several)], upstream=(2.0, 0.5, -1.0, 3.0))
    options = {"dist_impl": dist_impl}
    one, other = (several.run(module, case, theirs, options) for theirs in (False, True))
    assert_same(one, other, dist_impl)


def test_the_table_of_gradient_modes(several: Ranks) -> None:
    """The table in `fastclip.distributed`: size and direction of the towers' gradients."""
    size = size_of(several)
    case = Case("clip", EVEN[size])
    exact = truth("clip", *case.towers, 14.3, -3.0, PRECISIONS["float64"])
    for local_loss, gather_with_grad in WAYS:
        options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
        found = joined(several.run(module, case, False, options))
        assert found["dscale"] == pytest.approx(float(exact.dscale), rel=1e-9)
        ratio = np.linalg.norm(found["dx"]) / np.linalg.norm(np.asarray(exact.dx, float))
        cosine = (found["dx"] * np.asarray(exact.dx, float)).sum() / (
            np.linalg.norm(found["dx"]) * np.linalg.norm(np.asarray(exact.dx, float))
        )
        if local_loss and not gather_with_grad:
            assert cosine < 0.995
        else:
            assert cosine == pytest.approx(1, abs=1e-9)
            assert ratio == pytest.approx(1 if gather_with_grad else 1 / size, rel=1e-9)


def test_a_wrong_direction_warns_once(several: Ranks) -> None:
    for warnings in several.run(warnings_of, True, False):
        (message,) = warnings
        assert "ClipLoss(local_loss=True, gather_with_grad=False)" in message
        assert "cases.py" in message  # where it was called
    assert several.run(warnings_of, True, True) == [[]] * size_of(several)
