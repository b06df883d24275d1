"""Metrics have open_clip's keys and values, and take several captions of an image."""

import math

import pytest
import torch
from support.retrieval_oracle import dense_ranks, features

from fastclip import retrieval
from fastclip.retrieval.metrics import as_metrics
from fastclip.retrieval.ranks import Ranks


def expected(ranks: list[int], name: str) -> dict[str, float]:
    ordered = sorted(ranks)
    middle = (ordered[(len(ranks) - 1) // 2] + ordered[len(ranks) // 2]) / 2
    found = {
        f"{name}_mean_rank": sum(ranks) / len(ranks) + 1,
        f"{name}_median_rank": math.floor(middle) + 1,
    }
    return found | {f"{name}_R@{k}": sum(r < k for r in ranks) / len(ranks) for k in (1, 5, 10)}


def test_pairs() -> None:
    x, y = (features("integers", 40, 6, seed, torch.float32) for seed in (0, 1))
    found = retrieval.metrics(x, y, torch.tensor(100.0))
    rows, columns = dense_ranks(x, y), dense_ranks(y, x)
    wanted = expected(rows, "image_to_text") | expected(columns, "text_to_image")
    assert found == pytest.approx(wanted)
    assert list(found) == list(wanted)


def test_the_median_of_an_even_number() -> None:
    rows, columns = torch.tensor([3, 0, 3, 0]), torch.tensor([5, 1, 2, 7])
    found = as_metrics(Ranks(rows, columns), "a", "b", (1,))
    assert (found["a_to_b_median_rank"], found["b_to_a_median_rank"]) == (2, 4)


def test_lists_of_chunks_names_and_dtypes() -> None:
    x, y = (features("random", 40, 6, seed, torch.bfloat16) for seed in (2, 3))
    whole = retrieval.metrics(x, y)
    assert (
        retrieval.metrics(list(x.split(7)), list(y.split(9)), 2.0, retrieval_chunk_size=3) == whole
    )
    renamed = retrieval.metrics(x, y, 2.0, "audio", "caption", retrieval_dtype="model")
    assert list(renamed.values()) == list(whole.values())
    assert set(renamed) >= {"audio_to_caption_R@1", "caption_to_audio_mean_rank"}
    assert "image_to_text_R@3" in retrieval.metrics(x, y, ks=(3,), retrieval_device="cpu")


def test_a_negative_scale_reverses_and_a_zero_scale_ties_all() -> None:
    x = features("random", 9, 6, 4, torch.float32)
    assert retrieval.metrics(x, x, -1.0)["image_to_text_mean_rank"] == 9
    assert retrieval.metrics(x, x, 0.0)["image_to_text_mean_rank"] == 5
    with pytest.raises(ValueError, match="logit_scale must be a number, got nan"):
        retrieval.metrics(x, x, math.nan)


def test_five_captions_an_image() -> None:
    x, y = features("random", 12, 6, 5, torch.float32), features("random", 60, 6, 6, torch.float32)
    ids = torch.arange(12), torch.arange(60) // 5
    found = retrieval.metrics(x, y, ids=ids)
    rows, columns = dense_ranks(x, y, ids=ids), dense_ranks(y, x, ids=ids[::-1])
    wanted = expected(rows, "image_to_text") | expected(columns, "text_to_image")
    assert found == pytest.approx(wanted)


def test_nothing_has_no_metrics() -> None:
    assert all(math.isnan(value) for value in retrieval.metrics([], []).values())


def test_bad_arguments() -> None:
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match="must be pairs, or ids must be given, got 4 and 3"):
        retrieval.metrics(x, x[:3])
    with pytest.raises(ValueError, match="every image must have a text of its own, got none for"):
        retrieval.metrics(x, x, ids=(torch.arange(4), torch.arange(4) + 1))
    with pytest.raises(ValueError, match="retrieval_dtype must be 'fp32', 'model' or a dtype"):
        retrieval.metrics(x, x, retrieval_dtype="half")
    with pytest.raises(ValueError, match=r"image_features must be \(N, D\), or chunks of one D"):
        retrieval.metrics([x, x[:, :2]], x)
    with pytest.raises(ValueError, match="text_features must be finite, got nan in row 0"):
        retrieval.metrics(x, x * torch.nan)
    with pytest.raises(TypeError, match="pairs must be a"):
        retrieval.metrics(x, x, pairs=[[0, 0]])
    with pytest.raises(TypeError, match="ids must be a pair of tensors"):
        retrieval.metrics(x, x, ids=5)
    with pytest.raises(TypeError, match=r"text_features must be a torch\.Tensor"):
        retrieval.metrics(x, [x, None])
