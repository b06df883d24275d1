"""The progress of the check of all images."""

from pathlib import Path

import pytest
from PIL import Image

from fastclip.demo.workers import ALONE, Workers
from fastclip.pairs import check
from fastclip.pairs.pair import LeftOut, Pair, Place


class Bar:
    """A progress bar that counts."""

    def __init__(self, **options: object) -> None:
        self.options, self.done = options, 0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, count: int) -> None:
        self.done += count


@pytest.mark.parametrize(
    ("workers", "total", "disable"), [(ALONE, 71, None), (Workers(1, 2), 35, True)],
    ids=["alone", "a second rank"],
)  # fmt: skip
def test_the_first_rank_shows_how_many_images_are_checked(
    workers: Workers, total: int, disable: bool | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """disable=None shows the bar on a terminal."""
    bars = []
    monkeypatch.setattr(check, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[0])
    monkeypatch.setattr(check.dist, "all_reduce", lambda *_: None)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    pair = Pair("a", Place(str(tmp_path / "a.png")), ("a",), "")
    assert len(check.readable([pair] * 71, 4, LeftOut(), workers, 0)) == 71
    assert bars[0].done == bars[0].options["total"] == total
    assert bars[0].options["disable"] is disable
