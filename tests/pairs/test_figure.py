"""The figure of a training on one's own pairs, and the files beside it."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import torch
from PIL import Image

from fastclip.demo.drawing import plt
from fastclip.demo.rank_plots import Direction
from fastclip.pairs import figure
from fastclip.pairs.evaluate import HeldOut
from fastclip.pairs.images import Images
from fastclip.pairs.pair import Pair, Place

COUNT = 40


@pytest.fixture
def held_out(tmp_path: Path) -> HeldOut:
    """Images with four captions: ten images are right for each."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    place = Place(str(tmp_path / "a.png"))
    pairs = [Pair(f"{k}", place, (f"{k % 4} 狗",), "") for k in range(COUNT)]
    return HeldOut.of(pairs, 8)


def test_chance_counts_all_right_answers_in_both_directions(
    held_out: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Direction, ...]] = []
    for plot in ("histogram", "recall"):
        monkeypatch.setattr(figure, plot, lambda _, directions: drawn.append(directions))
    images, texts = torch.eye(4)[torch.arange(COUNT) % 4], torch.eye(4)
    figure.draw(tmp_path / "x.png", [1.0], {}, held_out, (images, texts))
    for to_text, to_image in drawn:
        assert (to_text.name, to_image.name) == ("image to text", "text to image")
        assert (to_text.answers, to_image.answers) == (4, COUNT)
        assert len(to_text.ranks) == COUNT and len(to_image.ranks) == 4
        chance, wanted = held_out.chance(), (to_text.chance, to_image.chance)
        for name, direction in zip(("image_to_text", "text_to_image"), wanted, strict=True):
            assert direction(1) == pytest.approx(chance[f"{name}_R@1"]) == pytest.approx(0.25)
            assert direction(5) == pytest.approx(chance[f"{name}_R@5"])
        assert to_image.chance(0) == to_text.chance(0) == 0
        assert to_image.chance(31) == to_text.chance(4) == 1
    assert len(drawn) == 2


@pytest.mark.parametrize("evaluated", [True, False])
def test_no_axes_are_empty(
    evaluated: bool, held_out: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    """With fewer steps than --evaluate-every, the loss has the place of recall, too."""
    found = []
    monkeypatch.setattr(plt, "close", found.append)
    evaluations = {1: dict.fromkeys(held_out.chance(), 0.5)} if evaluated else {}
    features = torch.randn(COUNT, 3), torch.randn(4, 3)
    figure.draw(tmp_path / "x.png", [2.0, 1.0], evaluations, held_out, features)
    top = found[0].subfigs[0].axes
    assert len(top) == 3 + evaluated and all(axes.lines or axes.patches for axes in top)
    assert not recwarn.list
    monkeypatch.undo()
    plt.close(found[0])
    assert Images([Place(str(tmp_path / "x.png"))], 8)[0, ""].shape == (3, 8, 8)
