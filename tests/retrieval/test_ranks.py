"""Ranks equal those of sorted exact scores, on every engine, on inputs where rounding would lie."""

import pytest
import torch
from conftest import DEVICE
from support.retrieval_oracle import KINDS, dense_ranks, dense_scores, features

from fastclip import retrieval

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check(x: torch.Tensor, y: torch.Tensor, engine: str, **options: object) -> None:
    on_device = {
        key: tuple(i.to(DEVICE) for i in v) if key == "ids" else v for key, v in options.items()
    }
    found = retrieval.ranks(x.to(DEVICE), y.to(DEVICE), backend=engine, **on_device)
    assert found.rows.tolist() == dense_ranks(x, y, **options)
    swapped = dict(options)
    if "offset" in options:
        swapped["offset"] = -options["offset"]
    if "ids" in options:
        swapped["ids"] = options["ids"][::-1]
    assert found.columns.tolist() == dense_ranks(y, x, **swapped)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_on_which_ties_and_rounding_decide(kind: str, engine: str) -> None:
    x, y = (features(kind, 70, 24, seed, torch.float32) for seed in (0, 1))
    check(x, y, engine)
    check(x, x, engine)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype: torch.dtype, engine: str) -> None:
    kind = "random" if dtype != torch.float16 else "duplicates"
    check(features(kind, 40, 33, 2, dtype), features(kind, 40, 33, 3, dtype), engine)


@pytest.mark.parametrize(
    ("m", "n", "offset"),
    [(1, 1, 0), (3, 50, 7), (50, 3, -20), (17, 131, -5), (300, 20, 0), (5, 5, 9)],
)
def test_shapes_and_offsets(m: int, n: int, offset: int, engine: str) -> None:
    x, y = (
        features("integers", m, 5, 4, torch.float32),
        features("integers", n, 5, 5, torch.float32),
    )
    check(x, y, engine, offset=offset)


def test_the_best_key_of_the_same_id_counts_and_others_of_it_do_not(engine: str) -> None:
    g = torch.Generator().manual_seed(6)
    x, y = (
        features("integers", 30, 4, 7, torch.float32),
        features("integers", 150, 4, 8, torch.float32),
    )
    captions = torch.arange(150) // 5
    check(x, y, engine, ids=(torch.arange(30), captions))
    classes = torch.randint(-3, 4, (30,), generator=g) * 2**40
    check(x, y, engine, ids=(classes, captions))  # some have none of their id


def test_many_pairs_of_one_id_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclip.retrieval import best_partner

    monkeypatch.setattr(best_partner, "CHUNK", 30)
    x, y = (
        features("integers", 20, 4, 9, torch.float32),
        features("integers", 26, 4, 10, torch.float32),
    )
    ids = torch.arange(20) % 3, torch.arange(26) % 4
    check(x, y, "cpu", ids=ids)


def test_pairs_that_no_ids_describe(engine: str) -> None:
    x, y = (features("integers", n, 4, n, torch.float32) for n in (20, 31))
    g = torch.Generator().manual_seed(19)
    pairs = torch.stack((torch.randint(0, 18, (60,), generator=g), torch.arange(60) % 29), 1)
    found = retrieval.ranks(
        x.to(DEVICE), y.to(DEVICE), pairs=pairs.to(DEVICE, torch.int32), backend=engine
    )
    related = torch.zeros(20, 31, dtype=torch.bool)
    related[pairs[:, 0], pairs[:, 1]] = True
    for ranks, mask, a, b in ((found.rows, related, x, y), (found.columns, related.T, y, x)):
        order = dense_scores(a, b).argsort(dim=1, descending=True, stable=True)
        right = mask.gather(1, order)
        first = torch.where(right.any(1), right.int().argmax(1), -1)
        assert torch.equal(ranks.cpu(), first)


def test_bad_pairs() -> None:
    x, pairs = torch.ones(4, 3), torch.tensor([[0, 0], [3, 4]])
    with pytest.raises(ValueError, match="pairs must be queries below 4 and keys below 4, got"):
        retrieval.ranks(x, x, pairs=pairs)
    with pytest.raises(ValueError, match=r"pairs must be \(P, 2\) on cpu, got \(4,\) on cpu"):
        retrieval.ranks(x, x, pairs=pairs.flatten())
    with pytest.raises(ValueError, match="pairs take the place of ids, got both"):
        retrieval.ranks(x, x, pairs=pairs, ids=(torch.arange(4), torch.arange(4)))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_few_queries_share_their_keys_among_threads(threads: int) -> None:
    x, y = (
        features("random", 3, 8, 11, torch.float32),
        features("random", 1500, 8, 12, torch.float32),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(x, y, "cpu", offset=1000)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("product", ["mm", "brgemm"])
def test_both_products_of_the_cpu_engine(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if product == "brgemm" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("brgemm needs AVX-512")
    monkeypatch.setenv("FASTCLIP_CPU", product)
    check(
        features("near", 90, 130, 13, torch.float32),
        features("near", 90, 130, 14, torch.float32),
        "cpu",
    )


def test_strides_normalisation_and_mixed_dtypes() -> None:
    x = features("random", 60, 16, 15, torch.float32)
    y = 3 * features("random", 60, 16, 16, torch.float64)
    found = retrieval.ranks(x.T.contiguous().T, y[:, :], normalize=True)
    unit = [torch.nn.functional.normalize(t.double(), dim=1) for t in (x, y)]
    assert found.rows.tolist() == dense_ranks(*unit)


def test_rows_alone_and_no_queries() -> None:
    x = features("random", 9, 4, 17, torch.float32)
    assert retrieval.ranks(x, x, columns=False).columns is None
    empty = retrieval.ranks(x[:0], x)
    assert (empty.rows.shape, empty.columns.tolist()) == ((0,), [-1] * 9)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(value: float, engine: str) -> None:
    x = torch.ones(4, 3)
    x[2, 1] = value
    x, ones = x.to(DEVICE), torch.ones(4, 3, device=DEVICE)
    with pytest.raises(ValueError, match=rf"keys must be finite, got {value} in row 2"):
        retrieval.ranks(ones, x, backend=engine)
    with pytest.raises(ValueError, match="queries must be finite"):
        retrieval.ranks(x, ones, backend=engine)


def test_other_bad_arguments() -> None:
    x = torch.ones(4, 3)
    ids = torch.arange(4), torch.arange(4)
    with pytest.raises(ValueError, match="take the place of offset, which must be 0, got 1"):
        retrieval.ranks(x, x, offset=1, ids=ids)
    with pytest.raises(TypeError, match="offset must be an int, got None"):
        retrieval.ranks(x, x, offset=None)
    with pytest.raises(ValueError, match=r"queries .* and keys .* must have one width"):
        retrieval.ranks(x, x[:, :2])
    with pytest.raises(TypeError, match="queries must be float64"):
        retrieval.ranks(x.long(), x)
    with pytest.raises(ValueError, match="x_ids must have an id for each row"):
        retrieval.ranks(x, x, ids=(ids[0][:2], ids[1]))
