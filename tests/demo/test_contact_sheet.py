"""The contact sheet: images, frames and captions."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from fastclip.demo.contact_sheet import LONGEST, Found, contact_sheet
from fastclip.demo.drawing import GREEN, GREY, plt, save


def image(number: int) -> np.ndarray:
    return np.full((2, 2, 3), number, np.uint8)


def shown(axes) -> tuple[int, str | None] | None:
    """Returns the number and the frame of an image."""
    if not axes.images:
        return None
    spine = axes.spines["left"]
    frame = to_hex(spine.get_edgecolor()) if spine.get_visible() else None
    return int(axes.images[0].get_array()[0, 0, 0]), frame


def test_right_images_have_a_green_frame_and_a_missed_one_follows_in_grey() -> None:
    figure = plt.figure()
    rows = [Found("a", [3, 1, 2], [2, 3]), Found("b $1", [5, 4, 6], [8, 9])]
    contact_sheet(figure, "title", rows, image)
    first, second = ([*map(shown, figure.axes[k : k + 5])] for k in (0, 5))
    assert first == [None, (3, GREEN), (1, None), (2, GREEN), None]
    assert second == [None, (5, None), (4, None), (6, None), (8, GREY)]
    assert [axes.texts[0].get_text() for axes in figure.axes[::5]] == ["a", "b $1"]
    plt.close(figure)


@pytest.mark.parametrize("caption", ["狗" * 500, "a dog " * 99, "a  dog\n\tand a cat"])
def test_captions_are_cut_by_characters(
    caption: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    figure = plt.figure()
    contact_sheet(figure, "title", [Found(caption, [1], [1])], image)
    text = figure.axes[0].texts[0].get_text()
    save(figure, tmp_path / "sheet.png")
    assert not recwarn.list  # of a font without these characters
    plain = "".join(caption.split())
    assert max(map(len, text.split("\n"))) <= 20
    text = "".join(text.split())
    if len(caption) > LONGEST:
        assert text[-1] == "…" and len(text) > 80
    assert plain.startswith(text.removesuffix("…"))
