"""Rows that are no usable pair are counted, the first few are named, and the rest is trained on."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from support import pairs_task

from fastclip.pairs.check import NO_FILE, NO_IMAGE, REASONS
from fastclip.pairs.pair import LeftOut, fingerprint
from fastclip.pairs.source import read_pairs


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_rows_of_a_table(tmp_path: Path) -> None:
    write(tmp_path, {f"{k}.png": png(k) for k in range(12)})
    write(tmp_path, {"cut.png": png(0)[:48], "text.png": b"no image"})
    rows = [f"{k}.png,caption {k}" for k in range(12)]
    rows += ["0.png,", "1.png", ",lost", "gone.png,a", "cut.png,a", "text.png,a", ".,a", "2.png, "]
    (tmp_path / "pairs.csv").write_text("\n".join(["path,caption", *rows]))
    task = pairs_task.loaded(str(tmp_path / "pairs.csv"), "--held-out", "0")
    assert len(task.trained) == 12
    assert {len(pair.captions) for pair in task.trained} == {1}
    assert task.left_out.lines() == [
        "3 left out, no caption: line 14 0.png, line 15 1.png, line 21 2.png",
        "1 left out, no path of an image: line 16",
        "2 left out, the image's file cannot be read: line 20 ., line 17 gone.png",
        "2 left out, the image cannot be decoded: line 18 cut.png, line 19 text.png",
    ]
    assert len(pairs_task.trained(task)) == 5


def test_rows_with_more_cells_than_the_header(tmp_path: Path) -> None:
    """A comma in a caption without quotes; cells without text are no loss."""
    table = tmp_path / "pairs.csv"
    table.write_text("path,text\na.png,a dog, a cat\nb.png,b,, \nc.png,c,d\n")
    left_out = LeftOut()
    assert [pair.captions for pair in read_pairs(str(table), left_out)] == [("b",)]
    assert left_out.lines() == ["2 left out, more cells than the header: line 2, line 4"]


def test_a_path_with_a_null_character(tmp_path: Path) -> None:
    write(tmp_path, {f"{k}.png": png(k) for k in range(10)})
    rows = [{"path": f"{k}.png", "text": "x"} for k in (*range(10), "\0")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = pairs_task.loaded(str(tmp_path / "pairs.jsonl"), "--held-out", "0")
    assert len(task.trained) == 10
    assert task.left_out.counts == {"the image's file cannot be read": 1}


def test_rows_of_jsonl(tmp_path: Path) -> None:
    lines = ["[1]", "{", "[" * 100_000, '{"path": 3, "caption": "x"}', '{"path": "a.png"}']
    lines += ['{"path": "a.png", "caption": 5}', '{"path": "a.png", "caption": "x"}']
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    left_out = LeftOut()
    assert len(read_pairs(str(tmp_path / "pairs.jsonl"), left_out)) == 1
    assert left_out.counts == {"no JSON object": 3, "no path of an image": 1, "no caption": 2}


def test_files_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(("a.png", "b.png", "c.png", "d.png"), b""))
    write(tmp_path, {"a.txt": b"a", "b.txt": b" \n", "c.txt": b"\xff\xfe\xff", "e.txt": b"e"})
    left_out = LeftOut()
    assert [pair.name for pair in read_pairs(str(tmp_path), left_out)] == ["a.png"]
    assert left_out.lines() == [
        "1 left out, no caption: b.png",
        "1 left out, caption not in UTF-8: c.png",
        "1 left out, no .txt beside it: d.png",
        "1 left out, no image beside it: e.txt",
    ]


def test_a_text_or_a_folder_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"a.png": b"", "a.txt": b"a", "b.png": b""})
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def denied(path: str) -> object:
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    left_out = LeftOut()
    assert [pair.name for pair in read_pairs(str(tmp_path), left_out)] == ["a.png"]
    assert left_out.lines() == [
        "1 left out, the .txt cannot be read: b.png",
        "1 left out, the folder cannot be read: closed",
    ]


def test_samples_of_a_tar(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    files = {
        "a.png": png(1), "a.txt": b"x\ny", "a.json": b"{}", "b.png": png(2), "c.txt": b"z",
        "d.jpg": png(3), "d.txt": b"", "e.png": png(4), "e.txt": b"e", "e.PNG": png(5),
        "f.v1.2.Png": png(6), "f.v1.2.txt": b"f",
    }  # fmt: skip
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    left_out = LeftOut()
    a, e = read_pairs(str(tmp_path), left_out)
    assert a.captions == ("x", "y") and a.place.read() == png(1)
    assert e.captions == ("e",) and e.place.read() == png(4)
    assert left_out.lines() == [
        "1 left out, no .txt: x.tar b",
        "1 left out, no image: x.tar c",
        "1 left out, no caption: x.tar d",
        "1 left out, two files of one ending: x.tar e.PNG",
        "1 left out, the first dot of a name begins its ending in a tar: x.tar f.v1.2.Png",
    ]


def test_names_and_captions_that_are_not_unicode(tmp_path: Path) -> None:
    """A file name in Latin-1, and half of a character of JSON."""
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(png(1))
    path.with_suffix(".txt").write_text("coffee")
    (tmp_path / os.fsdecode(b"th\xe9.png")).touch()
    left_out = LeftOut()
    (pair,) = read_pairs(str(tmp_path), left_out)
    assert pair.name == "caf?.png" and pair.place.read() == png(1)
    assert left_out.lines() == ["1 left out, no .txt beside it: th?.png"]
    (tmp_path / "pairs.jsonl").write_text('{"path": "a.png", "caption": "\\ud83d x"}')
    (pair,) = read_pairs(str(tmp_path / "pairs.jsonl"), left_out)
    assert pair.captions == ("? x",) and len(fingerprint([pair])) == 12


def test_the_first_few_are_named() -> None:
    left_out = LeftOut()
    for reason in (NO_FILE, NO_IMAGE):
        for line in range(5 - reason):
            left_out.add(REASONS[reason], f"line {line}")
    assert left_out.lines() == [
        "4 left out, the image's file cannot be read: line 0, line 1, line 2 and 1 more",
        "3 left out, the image cannot be decoded: line 0, line 1, line 2",
    ]
