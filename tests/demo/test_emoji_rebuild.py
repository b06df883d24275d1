"""Rebuilding the data set from packages of drawings."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclip.demo import emoji as emoji_data
from fastclip.demo.emoji import SHEET_COLUMNS, SIZE, VENDORS, read_sheet
from fastclip.demo.emoji.rebuild import (
    VERSION,
    captions,
    look_alikes,
    main,
    rebuild,
    shrink,
    unshared,
)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def test_shrinking_keeps_edges_free_of_invisible_colours() -> None:
    image = np.zeros((64, 64, 4), np.uint8)
    image[..., 1] = 255  # green, but transparent
    image[16:47, 16:47] = (255, 0, 0, 255)
    small = shrink(png(image))
    assert small.shape == (4, SIZE, SIZE)
    seen = small[3] > 0
    assert 0 < (small[3][seen] < 255).sum() < seen.sum()
    assert small[1].max() == 0 and (small[0][seen] == 255).all()
    assert (small[:, ~seen] == 0).all()


def package(vendor: str, version: str = VERSION) -> dict[str, bytes]:
    """Returns the files of a package like the real ones, with three emoji and a skin tone."""
    rng = np.random.default_rng(VENDORS.index(vendor))
    rows, files = [], {}
    for order, (name, subcategory) in enumerate(
        (("BIG CAT", "animal"), ("TONE", "skin-tone"), ("OTHER CAT", "animal"), ("X Flag", "flag"))
    ):
        image = rng.integers(0, 256, (64, 64, 4), np.uint8)
        files[f"img/{vendor}/64/{order}.png"] = png(image)
        row = {"unified": str(order), "name": name, "short_names": [name.lower(), f"s_{order}"]}
        row |= {"subcategory": subcategory, "category": "C", "sort_order": 9 - order}
        row |= {"image": f"{order}.png", "has_img_google": True, "has_img_twitter": True}
        rows.append(row)
    files["emoji.json"] = json.dumps(rows).encode()
    about = {"name": f"emoji-datasource-{vendor}", "version": version}
    return {**files, "package.json": json.dumps(about).encode()}


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def packed(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_rebuild_reads_folders_and_archives_alike(tmp_path: Path) -> None:
    results = []
    for make, suffix in ((unpacked, ""), (packed, ".tgz")):
        out = tmp_path / f"out{suffix}"
        out.mkdir()
        packages = [make(tmp_path / f"{v}{suffix}", package(v)) for v in VENDORS]
        assert rebuild(packages, out) == 3
        rebuilt = emoji_data.load(out)
        assert [c.captions for c in rebuilt.concepts] == [
            ("x flag", "s 3"),
            ("other cat", "s 2"),
            ("big cat", "s 0"),
        ]
        assert [c.code for c in rebuilt.concepts] == ["3", "2", "0"]
        for vendor, name in enumerate(VENDORS):
            expected = shrink(package(name)[f"img/{name}/64/3.png"])
            assert np.array_equal(rebuilt.drawings[0, vendor].numpy(), expected)
        results.append((out / "concepts.json").read_bytes())
    assert results[0] == results[1]


def test_rebuild_names_a_wrong_or_missing_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = unpacked(tmp_path / "old", package("google", "15.1.0"))
    for given, expected in (
        (old, "expected emoji-datasource-google 16.0.0, got emoji-datasource-google 15.1.0"),
        (tmp_path / "absent.tgz", "absent.tgz"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(given), str(old), "--out", str(tmp_path)])
        error = capsys.readouterr().err
        assert stopped.value.code == 1 and expected in error and error.count("\n") == 1


def test_captions_and_look_alikes_of_small_cases() -> None:
    row = {"name": "BIG CAT", "short_names": ["big_cat", "big-kitty"], "subcategory": "cats"}
    assert captions(row) == ("big cat", "big kitty")
    thumb = {"name": "THUMBS DOWN SIGN", "short_names": ["-1", "thumbsdown"], "subcategory": "h"}
    assert captions(thumb) == ("thumbs down sign", "-1", "thumbsdown")
    flag = {"name": "X Flag", "short_names": ["flag-x"], "subcategory": "country-flag"}
    assert captions(flag) == ("x flag",)
    a, b, c = (np.full((1, 2), value) for value in range(3))
    # 0 and 3 share a drawing of one vendor, 3 and 2 one of the other vendor, 1 and 4 a name.
    one, other = [a, b, c, a, np.full((1, 2), 9)], [a, b, c, c, np.full((1, 2), 8)]
    assert look_alikes(["v", "w", "x", "y", "w"], [one, other]) == [0, 1, 0, 0, 1]


def test_short_names_shared_by_two_groups_are_dropped() -> None:
    texts = [("cat face", "cat", "kitty"), ("cat", "puss"), ("lion", "puss"), ("x", "kitty")]
    # A caption shared within a group stays. A short name of two groups is dropped from both.
    assert unshared(texts, [0, 1, 2, 0]) == [
        ("cat face", "kitty"),
        ("cat",),
        ("lion",),
        ("x", "kitty"),
    ]


def test_a_sheet_holds_drawings_row_by_row(tmp_path: Path) -> None:
    drawings = np.zeros((SHEET_COLUMNS + 1, 4, SIZE, SIZE), np.uint8)
    drawings[:, 0, 0, 0] = np.arange(SHEET_COLUMNS + 1)
    drawings[:, 3] = 255
    emoji_data.write_sheet(tmp_path / "sheet.png", drawings)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (SHEET_COLUMNS * SIZE, 2 * SIZE)
        assert image.getpixel((3 * SIZE, 0)) == (3, 0, 0, 255)
        assert image.getpixel((0, SIZE)) == (SHEET_COLUMNS, 0, 0, 255)
    assert np.array_equal(read_sheet(tmp_path / "sheet.png", SHEET_COLUMNS + 1), drawings)
