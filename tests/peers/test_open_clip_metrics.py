"""open_clip's retrieval metrics, patched: the same numbers, without its matrix of logits."""

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from support.peers import peer
from support.tensor_results import TensorResults

from fastclip.integrations import open_clip as integration


@pytest.fixture
def theirs() -> Iterator[ModuleType]:
    """open_clip's trainer, patched before it is imported or after."""
    peer("open_clip")
    integration.patch()
    try:
        yield importlib.import_module("open_clip_train.train")
    finally:
        integration.unpatch()


class Largest(TensorResults):
    elements = 0

    def see(self, tensors: list[torch.Tensor]) -> None:
        self.elements = max([self.elements, *(t.numel() for t in tensors)])


def pairs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    x = F.normalize(torch.randn(n, 16, generator=g), dim=1)
    return x, F.normalize(x + 0.8 * torch.randn(n, 16, generator=g), dim=1)


def test_the_numbers_are_the_same(theirs: ModuleType) -> None:
    x, y = pairs(301)
    ours = theirs.get_clip_metrics(
        image_features=x, text_features=y, logit_scale=torch.tensor(50.0)
    )
    integration.unpatch()
    own = theirs.get_clip_metrics(image_features=x, text_features=y, logit_scale=torch.tensor(50.0))
    assert theirs.get_clip_metrics.__module__.startswith("open_clip_train")
    assert ours.keys() == own.keys()
    assert ours == pytest.approx({k: float(v) for k, v in own.items()}, rel=1e-6)


def test_duplicates_keep_the_lower_index_first(theirs: ModuleType) -> None:
    x = torch.ones(40, 4)
    found = theirs.get_clip_metrics(x, x, 1.0)
    assert found["image_to_text_mean_rank"] == 20.5
    assert found["image_to_text_R@1"] == 1 / 40


def test_no_matrix_is_made(theirs: ModuleType) -> None:
    x, y = pairs(1024)
    with Largest() as ours:
        theirs.get_clip_metrics(x, y, torch.tensor(50.0))
    integration.unpatch()
    with Largest() as own:
        theirs.get_clip_metrics(x, y, torch.tensor(50.0))
    assert ours.elements < 1024 * 64 < 1024 * 1024 <= own.elements


def test_a_model_that_has_diverged_does_not_end_the_training(theirs: ModuleType) -> None:
    x, y = pairs(8)
    x[3] = torch.nan
    found = theirs.get_clip_metrics(x, y, torch.tensor(50.0))
    assert set(found) >= {"image_to_text_R@1", "text_to_image_mean_rank"}
