"""`distributed.contrast`: statistics and gradients of one process on the concatenated batch.

The truth is `fastclip.reference.contrast` on the whole batch, in float64. Worlds of 2 to 4 ranks
are groups of one pool; a world of one needs no group.
"""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from support.ranks import contrast
from support.ranks.contrast import (
    INPUTS,
    NAMES,
    Case,
    joined,
    results_of_cases,
    results_of_one_process,
    results_of_rank,
)
from support.ranks.processes import Ranks

import fastclip
from fastclip import distributed

# Rows and columns by world size.
EVEN = {1: (7,), 2: (6, 6), 3: (4, 4, 4), 4: (3, 3, 3, 3)}
UNEVEN = {1: (7,), 2: (5, 2), 3: (4, 0, 5), 4: (3, 1, 0, 6)}
OTHERS = {1: (9,), 2: (3, 7), 3: (6, 2, 0), 4: (0, 5, 2, 3)}  # columns beside UNEVEN's rows
OFFSETS = {1: (2,), 2: (-1, 3), 3: (1, 0, -2), 4: (0, -1, 1, -3)}

OPTIONS = {
    "plain": {},
    "ids": {"ids": 4},
    "positives by id": {"ids": 5, "same_id": "positive"},
    "margin": {"margin": -0.05, "normalize": True},
    "key_bias": {"key_bias": True},
    "everything": {"ids": 5, "same_id": "positive", "margin": -0.1, "key_bias": True},
    "no positives": {"offsets": None, "ids": 4, "same_id": "positive"},
    "rows alone": {"wanted": (True, False), "ids": 5, "same_id": "positive"},
    "columns alone": {"wanted": (False, True), "key_bias": True},
    "unused statistics": {"unused": ("positives", "columns")},
}
# With few ids, and with so many that most rows' ids are no column's.
LINEAR = {
    "means": {"means": True, "normalize": True, "key_bias": True},
    "means and ids": {"means": True, "ids": 4},
    "means of positives": {"means": True, "ids": 5, "same_id": "positive", "key_bias": True},
    "means of rare positives": {"means": True, "ids": 40, "same_id": "positive"},
    "labels": {"labels": True, "margin": -0.1, "key_bias": True},
    "everything, labels": {
        "labels": True, "ids": 5, "same_id": "positive", "means": True, "key_bias": True,
        "normalize": True, "unused": ("rows", "column_means"),
    },
    "itself": {"one_set": True, "means": True},
    "itself and ids": {"one_set": True, "means": True, "ids": 6, "normalize": True},
    "itself, positives by id": {
        "one_set": True, "means": True, "ids": 6, "same_id": "positive",
    },
}  # fmt: skip


def cases_of(size: int) -> Iterator[Case]:
    shapes = (
        {"rows": EVEN[size], "columns": EVEN[size], "uneven": False},
        {"rows": UNEVEN[size], "columns": UNEVEN[size]},
        {"rows": UNEVEN[size], "columns": OTHERS[size], "offsets": OFFSETS[size]},
        {"rows": (2,) * size, "columns": (5,) * size, "offsets": (1,) * size, "uneven": False},
    )
    upstreams = (1.0, -3.0, 0.0, 1e-3)[:size]
    rings = (False, True) if size > 1 else (False,)
    every = product(shapes, OPTIONS.values(), rings, ("softmax", "sigmoid"))
    for k, (shape, options, ring, kind) in enumerate(every):
        # Exchanges take most of the time: a world runs half of the cases, the next larger one the
        # other half.
        if size == 1 or (k + k // 2 + k // 4 + size) % 2:
            yield Case(kind=kind, ring=ring, upstreams=upstreams, **{**shape, **options})


def linear_cases(size: int) -> Iterator[Case]:
    """Cases of labels, of means and of one set of features."""
    uneven = {"rows": UNEVEN[size], "columns": UNEVEN[size], "uneven": True}
    shapes = (
        {"rows": EVEN[size], "columns": EVEN[size], "uneven": False},
        uneven,
        {"rows": UNEVEN[size], "columns": OTHERS[size], "offsets": OFFSETS[size]},
        {"rows": (2,) * size, "columns": (5,) * size, "uneven": False},
    )
    rings = (False, True) if size > 1 else (False,)
    for k, (options, shape, ring) in enumerate(product(LINEAR.values(), shapes, rings)):
        if size > 1 and (k + k // 2 + k // 8 + size) % 2:
            continue
        if "labels" in options and "offsets" in shape:
            # A rank without columns can have no labels.
            shape = {**uneven, "columns": tuple(2 * n + (n > 0) for n in UNEVEN[size])}
        if "one_set" in options and shape["rows"] != shape["columns"]:
            shape = uneven
        kind = ("softmax", "sigmoid")[(k // 2 + k // 8) % 2]
        yield Case(kind=kind, ring=ring, upstreams=(1.0, -3.0, 0.0, 1e-3)[:size],
                   **{**shape, **options})  # fmt: skip


def mistakes(case: Case, found: dict, allowed: float = 1e-10) -> list[str]:
    exact, wrong = results_of_one_process(case), []
    for name in (*NAMES, *INPUTS):
        mine, true = found[name], exact[name]
        if (mine is None) != (true is None):
            wrong.append(f"{case} {name}: got {mine}, expected {true}")
        elif true is not None:
            finite = true.isfinite()
            same = torch.equal(mine[~finite].nan_to_num(2.0), true[~finite].nan_to_num(2.0))
            mistake = (mine - true)[finite].norm() / true[finite].norm().clamp_min(1e-6)
            if not (same and mistake <= allowed):
                wrong.append(f"{case} {name}: {float(mistake):.1e}, allowed {allowed:.1e}")
    return wrong


def assert_exact(
    four: Ranks, cases: list[Case], allowed: float = 1e-10, results: Callable = results_of_cases
) -> None:
    wrong = []
    for case, found in zip(cases, zip(*four.run(results, cases), strict=True), strict=True):
        wrong += mistakes(case, joined(case, found[: case.world_size]), allowed)
    assert not wrong, f"{len(wrong)}\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_equal_one_process(four: Ranks, size: int) -> None:
    """Both exchanges, all options, ranks without rows or columns. Upstream gradients differ between
    ranks in size and sign."""
    assert_exact(four, list(cases_of(size)))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_labels_means_and_one_set(four: Ranks, size: int) -> None:
    assert_exact(four, list(linear_cases(size)))


def test_means_in_chunks(four: Ranks) -> None:
    """Ranks of different sizes exchange sums of the same chunks."""
    cases = [
        Case(UNEVEN[4], OTHERS[4], means=True, offsets=OFFSETS[4]),
        Case(UNEVEN[4], OTHERS[4], means=True, ids=5, same_id="positive", key_bias=True,
             normalize=True, ring=True),
        Case(UNEVEN[4], UNEVEN[4], means=True, labels=True),
        Case((20, 1, 1), (1, 1, 1), means=True, ids=3),
    ]  # fmt: skip
    assert_exact(four, cases, results=contrast.results_in_chunks)


def test_a_process_alone_is_a_world_of_one() -> None:
    wrong = []
    for case in (*cases_of(1), *linear_cases(1)):
        wrong += mistakes(case, joined(case, [results_of_rank(case, 0, None)]))
    assert not wrong, "\n".join(wrong[:20])


def test_gpu_engines_in_a_process_alone(gpu_engine: str) -> None:
    """Engines that need a GPU sweep the same block rows, here those of one process."""
    shape = {"rows": (9,), "columns": (12,), "offsets": (2,), "dtype": torch.float32}
    for kind in ("softmax", "sigmoid"):
        case = Case(kind=kind, backend=gpu_engine, **shape, **OPTIONS["everything"])
        wrong = mistakes(case, joined(case, [results_of_rank(case, 0, None)]), 1e-5)
        assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_dtypes_engines_and_hard_scales(four: Ranks, ring: bool) -> None:
    """Includes peaked logits, for which each rank takes its own shifts."""
    shape = {"rows": UNEVEN[3], "columns": OTHERS[3], "offsets": OFFSETS[3], "ring": ring}
    everything = {**shape, **OPTIONS["everything"]}
    assert_exact(four, [
        Case(**everything, backend="torch"), Case(**everything, scale=300.0),
        Case(**shape, scale=3000.0), Case(**shape, scale=-50.0),
    ])  # fmt: skip
    assert_exact(four, [Case(**shape, dtype=torch.float32, normalize=True)], 1e-5)
    assert_exact(four, [Case(**shape, dtype=torch.bfloat16)], 1e-2)


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_inputs_frozen_on_single_ranks(four: Ranks, ring: bool) -> None:
    """A frozen input gets no gradient; all others get the same as if nothing were frozen."""
    plain = Case(UNEVEN[3], OTHERS[3], ring=ring, key_bias=True)
    labelled = Case(EVEN[3], EVEN[3], ring=ring, key_bias=True, labels=True, means=True)
    one_set = Case(UNEVEN[3], UNEVEN[3], ring=ring, one_set=True, means=True)
    for case, frozen in (
        (plain, ((0, "x"), (2, "y"), (1, "key_bias"))),
        (labelled, ((0, "x"), (2, "y"), (1, "key_bias"))),
        (one_set, ((0, "x"), (2, "scale"))),
    ):
        found, exact = zip(
            *four.run(results_of_cases, [case._replace(frozen=frozen), case]), strict=True
        )
        for rank, name in frozen:
            assert found[rank].pop(f"d{name}") is None
        for one, other in zip(found[:3], exact[:3], strict=True):
            for name, value in one.items():
                assert (value is None) == (other[name] is None), name
                if value is not None:
                    torch.testing.assert_close(value, other[name], equal_nan=True)


@pytest.mark.parametrize("sizes", [(5, 0, 3, 4), (0, 4, 0, 0)], ids=str)
def test_a_rank_without_pairs_takes_part_in_the_losses(four: Ranks, sizes: tuple) -> None:
    for rank, found in enumerate(four.run(contrast.losses_beside_an_empty_rank, sizes)):
        for what, (value, gradients, exact) in found.items():
            assert (value == 0) == (sizes[rank] == 0), what
            for mine, true in zip(gradients, exact, strict=True):
                assert (mine is None) == (true is None), what
                if true is not None:
                    torch.testing.assert_close(mine, true, msg=what)


LABELS = torch.tensor([3, 0, 0])  # columns of three rows
MISMATCHES = {
    "rows": ([{}, {"m": 5}, {}, {}], "one number of rows unless uneven=True, got rank 0: 3, rank"),
    "columns": ([{}, {}, {}, {"n": 9}], "one number of columns unless uneven=True, got rank 0: 4"),
    "no rows": (
        [{"m": 0, "uneven": True}] * 4,
        "the batch must not be empty, got number of rows rank 0: 0, rank 1: 0",
    ),
    "no columns": ([{"n": 0, "uneven": True}] * 4, "must not be empty, got number of columns"),
    "widths": ([{}, {}, {"width": 7}, {}], "one width D, got rank 0: 6, rank 1: 6, rank 2: 7"),
    "dtypes": ([{}, {"dtype": torch.float64}, {}, {}], "one dtype of x, got rank 0: torch.float32"),
    "kinds": ([{}, {"kind": "sigmoid"}, {}, {}], "one kind, got rank 0: 0, rank 1: 1"),
    "ids": ([{"has_ids": True}, {}, {}, {}], "one ids, got rank 0: 1, rank 1: 0"),
    "same_id": (
        [{"has_ids": True}, {"has_ids": True, "same_id": "positive"}] + [{"has_ids": True}] * 2,
        "one same_id, got rank 0: 0, rank 1: 1",
    ),
    "biases": ([{}, {"logit_bias": -1.0}, {}, {}], "one logit_bias, got rank 0: 0, rank 1: 1"),
    "margins": ([{"false_negative_margin": 0.1}, {}, {}, {}], "one false_negative_margin, got"),
    "key_bias": ([{"key_bias_dtype": torch.float32}, {}, {}, {}], "one key_bias, got rank 0: 1"),
    "dtypes of key_bias": (
        [{"key_bias_dtype": torch.float64}] + [{"key_bias_dtype": torch.float32}] * 3,
        "one dtype of key_bias, got rank 0: torch.float64, rank 1: torch.float32",
    ),
    "wanted": ([{}, {"rows": False}, {}, {}], "one rows, got rank 0: 1, rank 1: 0"),
    "wanted columns": ([{}, {"columns": False}, {}, {}], "one columns, got rank 0: 1, rank 1: 0"),
    "no offset": ([{}, {"offset": None}, {}, {}], "one offset=None, got rank 0: 0, rank 1: 1"),
    "labels": ([{}, {"labels": LABELS}, {}, {}], "one labels, got rank 0: 0, rank 1: 1"),
    "means": ([{}, {"means": True}, {}, {}], "one means, got rank 0: 0, rank 1: 1"),
    "one set": ([{}, {"one_set": True}, {}, {}], "one y=None, got rank 0: 0, rank 1: 1"),
    "rings": ([{}, {"ring": True}, {}, {}], "one ring, got rank 0: 0, rank 1: 1"),
    "nothing to differentiate": ([{}, {"grad": False}, {}, {}], "something to differentiate"),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_a_mismatch_is_an_error_on_every_rank(four: Ranks, mismatch: str) -> None:
    by_rank, message = MISMATCHES[mismatch]
    for error in four.run(contrast.call, by_rank):
        assert error.startswith("ValueError") and message in error, error


REFUSED = {
    "an empty side": {"m": 0},
    "an offset": {"offset": 1.5},
    "an offset beyond 64 bits": {"offset": 10**30},
    "forward mode": {"dual": True},
    "an unknown kind": {"kind": "other"},
    "no lines": {"rows": False, "columns": False},
    "the dense backend": {"backend": "reference"},
    "positives without ids": {"same_id": "positive"},
    "labels beyond the rank's columns": {"labels": LABELS + 1},
    "negative labels": {"labels": LABELS - 1},
    "few labels": {"labels": LABELS[:2]},
    "real labels": {"labels": LABELS * 1.0},
    "labels and an offset": {"labels": LABELS, "offset": 1},
    "labels of another id": {
        "labels": LABELS, "ids": (torch.arange(3), torch.zeros(4, dtype=torch.int64)),
    },
    "one set with an offset": {"one_set": True, "offset": None},
    "one set without rows": {"one_set": True, "rows": False},
    "one set with labels": {"one_set": True, "labels": LABELS},
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_an_argument_refused_on_one_rank_fails_on_all(four: Ranks, what: str) -> None:
    errors = four.run(contrast.call, [{}, REFUSED[what], {}, {}])
    for rank, error in enumerate(errors):
        others = "all ranks must have arguments that the loss accepts, got others on rank 1"
        assert (others in error) == (rank != 1) and error != "no error", error


def test_no_second_derivative(four: Ranks) -> None:
    for error in four.run(contrast.double_backward):
        assert "no second derivative" in error


def leaves(n: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 6, generator=generator) for _ in range(2)]
    return [t.requires_grad_() for t in (*tensors, torch.tensor(2.0))]


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("loss", ["clip_loss", "siglip_loss"])
def test_losses_of_a_process_alone(loss: str, ring: bool) -> None:
    """Without a group, values and gradients are those of `fastclip`'s losses."""
    mine, exact = leaves(), leaves()
    value = getattr(distributed, loss)(*mine, -1.0, ring=ring, normalize=True)
    true = getattr(fastclip, loss)(*exact, -1.0, normalize=True)
    torch.testing.assert_close(value, true)
    value.backward()
    true.backward()
    for one, other in zip(mine, exact, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_features_of_a_process_alone() -> None:
    x, y, _ = leaves()
    options = {"rank": 0, "world_size": 1, "gather_with_grad": True}
    every_x, every_y = distributed.gather_features(x, y, **options)
    torch.testing.assert_close((every_x, every_y), (x, y))
    (every_x * 2 + every_y * 3).sum().backward()
    assert x.grad.eq(2).all() and y.grad.eq(3).all()


def test_an_empty_batch_of_a_process_alone() -> None:
    x = torch.ones(0, 6)
    for options, rule in (({}, "the batch must not be empty"), ({"uneven": True}, "got batch")):
        with pytest.raises(ValueError, match=rule):
            distributed.clip_loss(x, x, 1.0, **options)
