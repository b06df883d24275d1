"""FASTCLIP_FP32 decides how float32 features are multiplied, and which engine multiplies them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from support.pretended_card import CUDA, backends, nothing_known, pretend

from fastclip.engine import arithmetic, preference


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None, str], None]]:
    """Returns a function that sets FASTCLIP_FP32 and torch's precision."""
    before = torch.backends.cuda.matmul.fp32_precision

    def configure(asked: str | None, precision: str = "ieee") -> None:
        if asked is None:
            monkeypatch.delenv("FASTCLIP_FP32", raising=False)
        else:
            monkeypatch.setenv("FASTCLIP_FP32", asked)
        torch.backends.cuda.matmul.fp32_precision = precision
        arithmetic.fp32.cache_clear()

    yield configure
    torch.backends.cuda.matmul.fp32_precision = before
    arithmetic.fp32.cache_clear()


def test_split_products_are_opt_in(
    settings: Callable[[str | None, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "split", Triton, the only engine that has it, comes first for fp32. tf32 overrides
    it."""
    for asked, first in ((None, "cuda"), ("", "cuda"), ("ieee", "cuda"), ("split", "triton")):
        settings(asked)
        products = arithmetic.arithmetic_of(torch.float32)
        assert products == ("split" if asked == "split" else "ieee")
        assert arithmetic.arithmetic_of(torch.bfloat16) == "half"
        rows = [row for row in preference.TABLE if row.takes(products, (9, 0))]
        assert preference.order(rows, 1000, 512)[0] == first
    settings("split", "tf32")
    assert arithmetic.arithmetic_of(torch.float32) == "tf32"
    settings("split")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert arithmetic.arithmetic_of(torch.float32) == "ieee"


def test_an_unknown_setting_is_an_error(settings: Callable[[str | None, str], None]) -> None:
    settings("bf16")
    with pytest.raises(
        ValueError, match=r"^FASTCLIP_FP32 must be one of 'split', 'ieee', got 'bf16'$"
    ):
        arithmetic.arithmetic_of(torch.float32)


def test_split_fp32_features_go_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "fp32", lambda: "split")
    with nothing_known() as patch:
        pretend(patch, (9, 0), "3.7.1")
        assert backends.choose(None, CUDA, torch.float32, 1000, 512) == "triton"
