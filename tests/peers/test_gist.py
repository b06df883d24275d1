"""Guided negatives are sentence-transformers' `GISTEmbedLoss` and `CachedGISTEmbedLoss`.

The guide's similarity of a query and its positive is the threshold of all the line's negatives:
those that the guide finds closer are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from support.peers import Case, assert_same, peer
from torch import Tensor, nn

from fastclip import contrast


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return peer("sentence_transformers.sentence_transformer.losses")


class Embedded(nn.Module):
    """A model whose features are already embedded, with the tokenizer that the loss asks for."""

    max_seq_length = 1

    def __init__(self) -> None:
        super().__init__()
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.column]}

    def __getitem__(self, index: int) -> Embedded:
        return self


class Student(Embedded):
    column = "student"


class Guide(Embedded):
    column = "guide"


def gist(
    theirs: ModuleType, columns: Sequence[Tensor], guides: Sequence[Tensor], scale: float,
    **options: object,
) -> Tensor:  # fmt: skip
    """Returns their loss of anchors, positives and perhaps negatives.

    Its gradient of a temperature is NaN, since a similarity that it leaves out is -inf.
    """
    loss = theirs.GISTEmbedLoss(Student(), Guide(), temperature=1 / scale, **options)
    given = [{"student": c, "guide": g} for c, g in zip(columns, guides, strict=True)]
    return loss(given, None)


@pytest.mark.parametrize("margin", [0.0, 0.15])
def test_a_model_that_guides_itself_is_a_false_negative_margin(
    margin: float, case: Case, theirs: ModuleType
) -> None:
    if case.d == 1 or case.sort == "duplicates":
        pytest.skip("similarities equal the threshold up to rounding")

    def ours(x: Tensor, y: Tensor) -> Tensor:
        c = contrast(x, y, case.scale, false_negative_margin=-margin, columns=False, normalize=True)
        return F.softplus(c.rows - c.positives, threshold=60).mean()

    assert_same(
        ours,
        lambda x, y: gist(
            theirs, (x, y), (x, y), case.scale, margin=margin, contrast_anchors=False,
            contrast_positives=False,
        ),
        case.features(2),
    )  # fmt: skip


def guided(
    columns: Sequence[Tensor], guides: Sequence[Tensor], scale: float, margin: float,
    relative: bool, anchors: bool, positives: bool,
) -> Tensor:  # fmt: skip
    """Returns the same loss, written on `contrast` with a guide."""
    own = (F.normalize(guides[0]) * F.normalize(guides[1])).sum(1)
    limits = own - margin * (own.abs() if relative else 1)
    block = functools.partial(
        contrast, logit_scale=scale, limits=limits, columns=False, normalize=True
    )
    (x, y, *negatives), (gx, gy, *of_negatives) = columns, guides
    c = block(x, y, guide=(gx, gy))
    parts = [c.positives, c.rows]
    parts += [block(x, None, guide=gx).rows] if anchors else []
    parts += [block(y, None, guide=gy).rows] if positives else []
    parts += [
        block(x, n, guide=(gx, g), offset=None).rows
        for n, g in zip(negatives, of_negatives, strict=True)
    ]
    return (functools.reduce(torch.logaddexp, parts) - c.positives).mean()


@pytest.mark.parametrize(
    ("strategy", "margin"), [("absolute", 0.0), ("absolute", 0.15), ("relative", 0.15)]
)
@pytest.mark.parametrize(
    ("kept", "negatives"),
    [((True, True), 1), ((True, False), 0), ((False, True), 1), ((False, False), 0)],
)
def test_a_guide_leaves_negatives_out(
    negatives: int, kept: tuple[bool, bool], strategy: str, margin: float, case: Case,
    theirs: ModuleType,
) -> None:  # fmt: skip
    if case.sort == "duplicates" and not margin:
        pytest.skip("similarities equal the threshold up to rounding")
    guides = [t.detach() for t in case.features(2 + negatives, d=case.d + 3)]
    assert_same(
        lambda *given: guided(given, guides, case.scale, margin, strategy == "relative", *kept),
        lambda *given: gist(
            theirs, given, guides, case.scale, margin=margin, margin_strategy=strategy,
            contrast_anchors=kept[0], contrast_positives=kept[1],
        ),
        case.features(2 + negatives),
    )  # fmt: skip
