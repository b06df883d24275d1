"""The best keys equal those of sorted exact scores, on every engine."""

import math

import pytest
import torch
from conftest import DEVICE
from support.retrieval_oracle import KINDS, dense_scores, dense_topk, features

from fastclip import retrieval
from fastclip.retrieval import chunks


def check(x: torch.Tensor, y: torch.Tensor, k: int, engine: str, **options: object) -> None:
    ids, own = options.get("ids"), options.get("exclude_own", False)
    limit = options.get("max_score", math.inf)
    on_device = dict(options)
    if ids is not None:
        on_device["ids"] = tuple(i.to(DEVICE) for i in ids)
    scores, indices = retrieval.topk(x.to(DEVICE), y.to(DEVICE), k, backend=engine, **on_device)

    def allowed(i: int, j: int, score: float) -> bool:
        return score <= limit and not (own and i == j) and (ids is None or ids[0][i] != ids[1][j])

    expected, places = dense_topk(x, y, k, allowed)
    assert indices.tolist() == places.tolist()
    torch.testing.assert_close(scores.cpu(), expected.to(scores.dtype), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_on_which_ties_and_rounding_decide(kind: str, engine: str) -> None:
    x, y = features(kind, 20, 24, 0, torch.float32), features(kind, 300, 24, 1, torch.float32)
    check(x, y, 5, engine)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, engine: str) -> None:
    x, y = features("random", 20, 17, 2, dtype), features("random", 90, 17, 3, dtype)
    check(x, y, 7, engine)
    scores, _ = retrieval.topk(x.to(DEVICE), y.to(DEVICE), 2, backend=engine)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 2000, 3), (33, 7, 10), (300, 40, 40)])
def test_shapes_and_more_keys_than_there_are(m: int, n: int, k: int, engine: str) -> None:
    x = features("integers", m, 6, 4, torch.float32)
    check(x, features("integers", n, 6, 5, torch.float32), k, engine)


def test_own_keys_ids_and_high_scores_are_left_out(engine: str) -> None:
    x, y = (features("integers", n, 5, n, torch.float32) for n in (60, 80))
    check(x, x, 6, engine, exclude_own=True)
    check(x, y, 6, engine, exclude_own=True, max_score=2.0)
    ids = torch.arange(60) % 7, torch.arange(80) % 5
    check(x, y, 6, engine, ids=ids)
    check(x, y, 90, engine, ids=ids, max_score=0.0)


def test_a_limit_that_float32_products_miss(engine: str) -> None:
    x, y = (features("near", n, 40, n, torch.float32) for n in (8, 200))
    scores = dense_scores(x, y).flatten().sort().values
    gaps = scores.diff()
    middle = len(scores) // 2 + int(gaps[len(scores) // 2 :].argmax())
    assert 1e-12 < gaps[middle] < 1e-7
    check(x, y, 20, engine, max_score=scores[middle : middle + 2].mean().item())


def test_more_queries_than_keys_leave_out_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 64)
    x, y = features("random", 40, 5, 0, torch.float32), features("random", 7, 5, 1, torch.float32)
    check(x, y, 3, "torch", exclude_own=True)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_scores_beyond_float32(descending: bool, k: int, engine: str) -> None:
    y = torch.linspace(4e8, 9e8, 400)[:, None]
    x = torch.tensor([[1e30], [-1e30]])
    y = y.flip(0) if descending else y
    _, indices = retrieval.topk(x.to(DEVICE), y.to(DEVICE), k, backend=engine)
    expected = (x.double() @ y.double().T).topk(k, 1).indices
    assert torch.equal(indices.cpu(), expected)


def test_many_candidates_are_cut_more_than_once() -> None:
    # Ascending scores: every key enters.
    y = torch.linspace(0, 1, 3000)[:, None]
    check(torch.ones(2, 1), y, 10, "cpu")
    check(torch.ones(2, 1), y.flip(0), 10, "cpu")


def test_results_do_not_depend_on_threads() -> None:
    x, y = (features("duplicates", n, 12, n, torch.float32) for n in (40, 3000))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(retrieval.topk(x, y, 9, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for scores, indices in found[1:]:
        assert torch.equal(scores, found[0][0]) and torch.equal(indices, found[0][1])


def test_bad_arguments() -> None:
    x = torch.ones(4, 3)
    for k in (0, -1, 2.0, True, 2**31):
        with pytest.raises(ValueError, match="k must be an integer from 1 to"):
            retrieval.topk(x, x, k)
    with pytest.raises(ValueError, match="max_score must be a finite number or None, got nan"):
        retrieval.topk(x, x, 1, max_score=math.nan)
    with pytest.raises(ValueError, match="queries must be finite"):
        retrieval.topk(x * math.nan, x, 1)
