"""Labels, means and one set of features against itself: gradients, hard inputs, refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from support.contrast_case import (
    OPTIONS,
    Evaluated,
    check_gradients,
    check_statistics,
    make_problem,
    random_upstream,
)
from support.judge import name_of
from support.oracle import rounded
from support.statistics_oracle import KINDS, NAMES, Exact, Problem
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastclip import contrast
from fastclip.engine import group_sums
from fastclip.engine.block import Block, Side
from fastclip.kinds import LineStatistics

LABELS, ITSELF = "everything, labels", "itself, positives by id"
for_both = pytest.mark.parametrize("options", [LABELS, ITSELF])
for_every_kind = pytest.mark.parametrize("kind", KINDS)


def linear(found: LineStatistics, upstream: dict[str, Tensor]) -> Tensor:
    """A function of the statistics with these gradients."""
    values = {name: getattr(found, name) for name in upstream}
    return sum((g * values[k].nan_to_num(0, 0, 0)).sum() for k, g in upstream.items())


def check(problem: Problem, evaluated: Evaluated, dtype: torch.dtype, *names: str) -> None:
    """Checks the statistics, and the gradients of a linear function of those that are named."""
    exact, found = Exact(problem), evaluated.statistics
    check_statistics(problem, found, dtype, exact)
    every = random_upstream(found)
    upstream = {name: every[name] for name in names or every}
    truth = {name: g.cpu().numpy() for name, g in upstream.items()}
    gradients = evaluated.gradients(linear(found, upstream))
    check_gradients(problem, gradients, truth, dtype, exact)


# ---- every engine, awkward shapes, hard inputs ---------------------------------------------------


@for_every_kind
@pytest.mark.parametrize(
    "options, normalize",
    [(LABELS, True), ("labels", False), ("itself and ids", False), (ITSELF, True)],
)
def test_gpu_engines(
    gpu_engine: str, device: torch.device, kind: str, options: str, normalize: bool
) -> None:
    """The engines for CUDA tensors; without a GPU they are interpreted or emulated."""
    problem = make_problem(37, 41, 9, kind=kind, normalize=normalize, **OPTIONS[options])
    check(problem, Evaluated(problem, gpu_engine, device), torch.float32)


@for_every_kind
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 2), (31, 1), (1, 33), (127, 131)], ids=str)
def test_awkward_shapes(
    backend: str, device: torch.device, kind: str, shape: tuple[int, int]
) -> None:
    for options in (LABELS, ITSELF, "itself", "means of positives"):
        problem = make_problem(*shape, 5, kind=kind, dtype=torch.float64, **OPTIONS[options])
        check(problem, Evaluated(problem, backend, device, torch.float64), torch.float64)


@for_every_kind
@for_both
@pytest.mark.parametrize("scale", [0.0, -20.0, 300.0, 1e4])
def test_any_scale(
    engine: str, device: torch.device, kind: str, options: str, scale: float
) -> None:
    problem = make_problem(40, 50, 16, kind=kind, scale=scale, **OPTIONS[options])
    check(problem, Evaluated(problem, engine, device), torch.float32)


@for_every_kind
def test_labels_without_ids_take_only_their_own_pair_out(
    engine: str, device: torch.device, kind: str
) -> None:
    """Equal rows share a label, and other columns equal the labelled one."""
    problem = make_problem(20, 12, 5, kind=kind, labels=True, means=True)
    problem.x[3:9], problem.labels[3:9] = problem.x[3], 4
    problem.y[7] = problem.y[4]
    check(problem, Evaluated(problem, engine, device), torch.float32)


def test_labels_equal_an_offset(engine: str, device: torch.device) -> None:
    by_offset = make_problem(20, 30, 6, ids=9, key_bias=1.0, means=True)
    ids = by_offset.ids[1][:20], by_offset.ids[1]
    by_offset = replace(by_offset, ids=ids)
    by_label = replace(by_offset, labels=np.arange(20))
    found = [Evaluated(p, engine, device, torch.float64) for p in (by_offset, by_label)]
    torch.testing.assert_close(*(one.statistics for one in found), equal_nan=True)
    upstream = random_upstream(found[0].statistics)
    first, second = (one.gradients(linear(one.statistics, upstream)) for one in found)
    for name, gradient in first.items():
        np.testing.assert_allclose(second[name], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_labels_and_ids_of_any_integers(
    engine: str, device: torch.device, dtype: torch.dtype
) -> None:
    x, y = torch.randn(2, 6, 4, device=device).unbind()
    labels, ids = torch.tensor([5, 0, 0, 3, 2, 5], device=device), torch.arange(6, device=device)
    found = [
        contrast(
            x, y, 2.0, labels=labels.to(t), ids=(ids[labels].to(t), ids.to(t)), means=True,
            same_id="positive", backend=engine,
        )
        for t in (torch.int64, dtype)
    ]  # fmt: skip
    torch.testing.assert_close(*found, equal_nan=True)


@for_both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_with_normalize(
    engine: str, device: torch.device, dtype: torch.dtype, options: str
) -> None:
    problem = make_problem(9, 11, 6, normalize=True, dtype=dtype, **OPTIONS[options])
    for side in (problem.x, problem.y):
        if side is not None:
            side[2], side[5] = 0, rounded(side[5] * 1e-15, name_of(dtype))
    ours = Evaluated(problem, engine, device, dtype)
    check_statistics(problem, ours.statistics, dtype)
    upstream = random_upstream(ours.statistics)
    found = ours.gradients(linear(ours.statistics, upstream))
    truth = Exact(problem).gradients({k: g.cpu().numpy() for k, g in upstream.items()})
    narrow = dtype in (torch.bfloat16, torch.float16)
    allowed = 0.2 if narrow else 1e-9 if dtype == torch.float64 else 1e-3
    for name in ("dx", "dy"):
        if name not in found:
            continue
        right = getattr(truth, name)
        assert np.isfinite(found[name]).all()
        for k, (mine, true) in enumerate(zip(found[name], right, strict=True)):
            if dtype == torch.float16 and k in (2, 5):
                assert not mine.any()
            else:
                assert np.linalg.norm(mine - true) <= allowed * np.linalg.norm(true), (name, k)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [LABELS, "means of positives", "means", "itself and ids"])
def test_a_spoilt_feature_shows_in_every_mean_of_its_pairs(
    backend: str, device: torch.device, options: str, value: float
) -> None:
    problem = make_problem(12, 14, 5, **OPTIONS[options])
    exact, seen = Exact(replace(problem, margin=None)), set()
    for row, column in ((4, None), (None, 6)):
        sides = [side if side is None else side.copy() for side in (problem.x, problem.y)]
        if row is None and sides[1] is None:
            continue
        sides[0 if column is None else 1][row or column] = value
        c = Evaluated(problem.with_sides(*sides), backend, device).statistics
        spoilt = np.zeros(exact.t.shape, bool)
        if column is None:
            spoilt[row] = True
        if problem.y is None or row is None:
            spoilt[:, row or column] = True
        shown = {name: mask for name, mask in exact.counts.items() if name.endswith("means")}
        if problem.labels is not None:
            shown["positives"] = exact.own
        for name, counts in shown.items():
            lines = (counts & spoilt & (exact.s > -np.inf)).any(int(not name.startswith("column")))
            assert not getattr(c, name).isfinite()[torch.from_numpy(lines)].any(), name
            seen |= {name} if lines.any() else set()
    assert seen == set(shown)


def test_spoilt_key_biases_show_in_means(backend: str, device: torch.device) -> None:
    problem = make_problem(5, 7, 4, key_bias=1.0, means=True, labels=True)
    problem.key_bias[problem.labels[2]] = np.nan
    c = Evaluated(problem, backend, device).statistics
    assert c.row_means.isnan().all() and c.column_means[problem.labels[2]].isnan()
    assert c.positives.isnan().cpu().numpy().tolist() == (
        (problem.labels == problem.labels[2]).tolist()
    )


# ---- gradients -----------------------------------------------------------------------------------


@for_every_kind
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_each_statistic(
    engine: str, device: torch.device, name: str, kind: str
) -> None:
    for options in (LABELS, ITSELF, "means of positives"):
        problem = make_problem(20, 17, 6, kind=kind, dtype=torch.float64, **OPTIONS[options])
        evaluated = Evaluated(problem, engine, device, torch.float64)
        if getattr(evaluated.statistics, name) is not None:
            check(problem, evaluated, torch.float64, name)


@for_both
@for_every_kind
def test_frozen_inputs(engine: str, device: torch.device, options: str, kind: str) -> None:
    """Only the others get gradients, the same ones; each input alone, too."""
    problem = make_problem(20, 30, 6, kind=kind, normalize=True, **OPTIONS[options])
    whole = Evaluated(problem, engine, device)
    upstream = random_upstream(whole.statistics)
    expected = whole.gradients(linear(whole.statistics, upstream))
    names = set(whole.leaves)
    for wanted in ([n] for n in names), (names - {n} for n in names), ({"dscale", "dbias"},):
        for some in wanted:
            one = Evaluated(problem, engine, device, wanted=set(some))
            linear(one.statistics, upstream).backward()
            for name, leaf in one.leaves.items():
                assert (leaf.grad is None) == (name not in some)
                if leaf.grad is not None:
                    np.testing.assert_allclose(
                        leaf.grad.cpu().numpy(), expected[name], rtol=2e-5, atol=1e-5
                    )


@for_both
def test_without_gradients(engine: str, device: torch.device, options: str) -> None:
    problem = make_problem(20, 30, 6, **OPTIONS[options])
    with torch.no_grad():
        found = Evaluated(problem, engine, device).statistics
    assert not any(t.requires_grad for t in found if t is not None)
    check_statistics(problem, found, torch.float32)


@for_both
def test_repeated_calls_and_backwards_are_bitwise_equal(
    engine: str, device: torch.device, options: str
) -> None:
    problem, runs = make_problem(300, 200, 16, **OPTIONS[options]), []
    for _ in range(2):
        c = Evaluated(problem, engine, device)
        loss = linear(c.statistics, random_upstream(c.statistics))
        for _ in range(2):
            gradients = torch.autograd.grad(loss, tuple(c.leaves.values()), retain_graph=True)
            runs.append([t for t in (*c.statistics, *gradients) if t is not None])
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("name", ["positives", "row_means", "row_positive_means"])
def test_a_second_derivative_is_refused(engine: str, device: torch.device, name: str) -> None:
    c = Evaluated(make_problem(20, 30, 6, **OPTIONS[LABELS]), engine, device)
    loss = getattr(c.statistics, name).nan_to_num(0, 0, 0).sum()
    (dscale,) = torch.autograd.grad(loss, c.leaves["dscale"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dscale.backward()


def test_rows_or_columns_alone(engine: str, device: torch.device) -> None:
    problem = make_problem(20, 30, 6, **OPTIONS[LABELS])
    both = Evaluated(problem, engine, device).statistics
    for wanted, other in (("row", "column"), ("column", "row")):
        one = Evaluated(
            problem, engine, device, rows=wanted == "row", columns=wanted == "column"
        )  # fmt: skip
        upstream = random_upstream(one.statistics)
        for name in NAMES:
            value = getattr(one.statistics, name)
            assert (value is None) == name.startswith(other)
            if value is not None:
                torch.testing.assert_close(value, getattr(both, name), equal_nan=True)
        truth = {name: g.cpu().numpy() for name, g in upstream.items()}
        gradients = one.gradients(linear(one.statistics, upstream))
        check_gradients(problem, gradients, truth, torch.float32)


def test_a_supervised_loss_of_one_set(engine: str, device: torch.device) -> None:
    """Khosla et al.'s loss of one view, from its definition."""
    x = torch.randn(21, 6, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.arange(21, device=device) // 3
    c = contrast(x, None, 3.0, ids=ids, same_id="positive", means=True, backend=engine)
    loss = (torch.logaddexp(c.rows, c.row_positives) - c.row_positive_means).mean()
    s = (3.0 * x @ x.T).masked_fill(torch.eye(21, dtype=torch.bool, device=device), -torch.inf)
    positive = (ids[:, None] == ids) & (s > -torch.inf)
    expected = (s.logsumexp(1) - torch.where(positive, s, 0).sum(1) / positive.sum(1)).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 1 << 8, 1 << 11])
@pytest.mark.parametrize("options", [LABELS, "means of positives", "itself and ids"])
def test_means_in_chunks(
    engine: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, options: str, size: int
) -> None:
    monkeypatch.setattr(group_sums, "CHUNK", size)
    problem = make_problem(11, 13, 7, normalize=True, dtype=torch.float64, **OPTIONS[options])
    check(problem, Evaluated(problem, engine, device, torch.float64), torch.float64)


def test_chunks_have_the_stated_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """They follow one another, and none has more bytes unless it has one column."""
    x = torch.randn(20, 37)
    for size in (1, 8 * 150, 8 * 1500, 8 * 50 * 37 + 8 * 37, 1 << 20):
        monkeypatch.setattr(group_sums, "CHUNK", size)
        block = Block(Side(x), Side(x), torch.tensor(1.0))
        places = [c.place for c in group_sums.chunks(block, None, 50, torch.float64)]
        assert [p.start for p in places] == [0, *(p.stop for p in places[:-1])]
        assert places[-1].stop == 37
        for place in places:
            width = place.stop - place.start
            assert width == 1 or 8 * 51 * width <= size


def test_no_matrix_is_allocated(engine: str, device: torch.device) -> None:
    if DEVICE.type != "cpu":
        pytest.skip("the profiler's memory events are read for the CPU only")
    n, d = 6144, 8
    problem = make_problem(n, n, d, **OPTIONS[LABELS] | {"ids": 1000})
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        c = Evaluated(problem, engine, device, memory_budget=0)
        c.gradients(linear(c.statistics, random_upstream(c.statistics)))
    sizes = [e.nbytes() for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    matrix = 4 * n * n
    assert max(sizes) < matrix / 2 and max(np.cumsum(sizes)) < matrix * 2 / 3


def test_one_set_of_one_feature_has_no_pairs(backend: str, device: torch.device) -> None:
    x = torch.ones(1, 3, device=device, requires_grad=True)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    c = contrast(x, None, 2.0, ids=ids, same_id="positive", means=True, backend=backend)
    assert c.rows == c.row_positives == -torch.inf
    assert c.row_means.isnan() and c.row_positive_means.isnan()
    assert c.columns is c.positives is c.column_means is None
    F.relu(torch.cat([t for t in c if t is not None])).nan_to_num(0).sum().backward()
    assert not x.grad.any()
