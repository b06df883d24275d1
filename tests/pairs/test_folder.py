"""Links in a folder of images."""

from pathlib import Path

from fastclip.pairs.pair import LeftOut
from fastclip.pairs.source import read_pairs


def test_links_are_followed_and_no_image_is_there_twice(tmp_path: Path) -> None:
    """Copies under other names could be held out and trained on."""
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    for name in ("b/x", "b/y"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / f"{name}.png").touch()
        (source / f"{name}.txt").write_text("text")
    elsewhere.mkdir()
    (elsewhere / "z.png").touch()
    (elsewhere / "z.txt").write_text("text")
    (source / "self").symlink_to(".")
    (source / "a").symlink_to("b")
    (source / "other").symlink_to(elsewhere)
    pairs = read_pairs(str(source), LeftOut())
    assert [pair.name for pair in pairs] == ["b/x.png", "b/y.png", "other/z.png"]
