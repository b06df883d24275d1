"""Our GIST losses are sentence-transformers' `GISTEmbedLoss` and `CachedGISTEmbedLoss`.

The guide's similarity of a query and its positive is the threshold of all the line's negatives:
those that the guide finds closer are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.embedded import Embedded, guide
from support.peers import Case, assert_same, peer
from torch import Tensor

from fastclip import contrast
from fastclip.integrations import sentence_transformers as ours

MARGINS = [("absolute", 0.0), ("absolute", 0.15), ("relative", 0.0), ("relative", 0.15)]
KEPT = [((True, True), 1), ((True, False), 0), ((False, True), 1), ((False, False), 0)]


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return peer("sentence_transformers.sentence_transformer.losses")


@pytest.fixture(autouse=True)
def nothing_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(ours.HOST), "falls_back", lambda host, reason: pytest.fail(reason))


def gist(
    of: ModuleType, columns: Sequence[Tensor], guides: Sequence[Tensor], scale: float,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The loss of anchors, positives and perhaps negatives by the class of a module.

    Their gradient of a temperature is NaN, since a similarity that it leaves out is -inf.
    """
    loss = of.GISTEmbedLoss(Embedded(), guide(), temperature=1 / scale, **options)
    given = [{"embedding": c, "guide": g} for c, g in zip(columns, guides, strict=True)]
    return loss(given, None)


@pytest.mark.parametrize(("strategy", "margin"), MARGINS)
@pytest.mark.parametrize(("kept", "negatives"), KEPT)
def test_a_guide_leaves_negatives_out(
    negatives: int, kept: tuple[bool, bool], strategy: str, margin: float, case: Case,
    theirs: ModuleType,
) -> None:  # fmt: skip
    if case.sort == "duplicates" and not margin:
        pytest.skip("similarities of rows of several lengths equal the limit up to rounding")
    guides = [t.detach() for t in case.features(2 + negatives, d=case.d + 3)]
    options = {"margin": margin, "margin_strategy": strategy}
    options |= dict(zip(("contrast_anchors", "contrast_positives"), kept, strict=True))
    assert_same(
        lambda *given: gist(ours, given, guides, case.scale, **options),
        lambda *given: gist(theirs, given, guides, case.scale, **options),
        case.features(2 + negatives),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [16, 384])
def test_pairs_in_both_orders(d: int, dtype: torch.dtype, theirs: ModuleType) -> None:
    """Then the guide finds an anchor as close to another anchor as to its positive."""
    first, second = (t.detach() for t in Case(24, d, 20.0, "close").features(2, dtype=dtype))
    guides = [torch.cat((first, second)), torch.cat((second, first)), torch.cat((second, second))]
    assert_same(
        lambda *given: gist(ours, given, guides, 20.0, margin=0.0),
        lambda *given: gist(theirs, given, guides, 20.0, margin=0.0),
        Case(48, 24, 20.0, "close").features(3), rtol=1e-6, atol=1e-9,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [16, 384])
def test_a_positive_that_occurs_twice_stays(d: int, dtype: torch.dtype, theirs: ModuleType) -> None:
    """The same text has the same embedding: the guide's similarities are equal, not closer."""
    n = 48
    guides = Case(n, d, 20.0, "close").features(2, dtype=dtype)
    guides = [guides[0].detach(), guides[1].detach()[torch.arange(n) % 12]]
    options = {"margin": 0.0, "contrast_anchors": False, "contrast_positives": False}
    assert_same(
        lambda *given: gist(ours, given, guides, 20.0, **options),
        lambda *given: gist(theirs, given, guides, 20.0, **options),
        Case(n, 24, 20.0, "close").features(2), rtol=1e-6, atol=1e-9,
    )  # fmt: skip


@pytest.mark.parametrize("backward", [False, True])
def test_the_cached_loss(backward: bool, case: Case, theirs: ModuleType) -> None:
    columns, guides = (case.features(4, d=d) for d in (case.d, case.d + 3))
    reps_guided = [list(g.detach().split(5)) for g in guides]
    found = []
    for of in (ours, theirs):
        loss = of.CachedGISTEmbedLoss(
            Embedded(), guide(), temperature=1 / case.scale, margin=0.1, mini_batch_size=5
        )
        reps = [[part.detach().requires_grad_() for part in c.split(5)] for c in columns]
        value = loss.calculate_loss(reps, reps_guided, with_backward=backward)
        assert value.requires_grad != backward
        if not backward:
            value.backward()
        found.append([value.detach(), *(leaf.grad for column in reps for leaf in column)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("margin", [0.0, 0.15])
def test_a_model_that_guides_itself_is_a_false_negative_margin(
    margin: float, case: Case, theirs: ModuleType
) -> None:
    if case.sort == "duplicates" and not margin:
        pytest.skip("similarities of rows of several lengths equal the limit up to rounding")

    def on_contrast(x: Tensor, y: Tensor) -> Tensor:
        c = contrast(x, y, case.scale, false_negative_margin=-margin, columns=False, normalize=True)
        return F.softplus(c.rows - c.positives, threshold=60).mean()

    options = {"margin": margin, "contrast_anchors": False, "contrast_positives": False}
    assert_same(
        on_contrast,
        lambda x, y: gist(theirs, (x, y), (x, y), case.scale, **options),
        case.features(2),
    )
