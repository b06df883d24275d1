"""Tables, folders and tars with the same pairs give the same training."""

import importlib.util
import json
from pathlib import Path

import pytest
from support import pairs_task
from support.exported_emoji import FORMS, export, images_with_captions

from fastclip.pairs.pair import LeftOut, Pair, hold_out
from fastclip.pairs.source import read_pairs


def read(source: str, *columns: str) -> list[Pair]:
    left_out = LeftOut()
    pairs = read_pairs(source, left_out, *columns)
    assert not left_out.counts
    return pairs


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    here = [form for form in FORMS if form != "tars" or importlib.util.find_spec("webdataset")]
    return {form: export(tmp_path_factory.mktemp(form), form) for form in here}


def test_every_form_has_the_same_pairs(sources: dict[str, str], tmp_path: Path) -> None:
    wanted = {
        name: (sorted(set(captions)), (tmp_path / name))
        for name, (image, captions) in images_with_captions(40).items()
        if image.save(tmp_path / name) is None
    }
    for source in sources.values():
        pairs = read(source)
        assert [pair.name for pair in pairs] == sorted(wanted)
        for pair in pairs:
            captions, file = wanted[pair.name]
            assert list(pair.captions) == captions
            assert pair.place.read() == file.read_bytes()


def test_every_form_has_the_same_curve(sources: dict[str, str]) -> None:
    """The rows of the JSONL file are in reverse order."""
    curves = [pairs_task.curve(source) for source in sources.values()]
    assert all(curve == curves[0] for curve in curves)
    assert len(set(curves[0])) == 5
    assert pairs_task.curve(sources["csv"], "--seed", "1") != curves[0]


def test_tars_may_be_a_folder_one_file_or_a_range(sources: dict[str, str]) -> None:
    pytest.importorskip("webdataset")
    folder = Path(sources["tars"]).parent
    every = read(str(folder))
    assert len(every) == 40 and every == read(sources["tars"])
    one = read(str(folder / "002.tar"))
    assert one == [pair for pair in every if pair.place.file.endswith("002.tar")]
    assert len(one) == 10
    assert len(read(str(folder / "{000..001}.tar"))) == 20


def test_a_folder_is_read_at_any_depth(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.jpeg", "a/deep/d.WEBP", ".hidden/x.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.with_suffix(".txt").write_text(f"one {name}\n\n  two \r\n")
    (tmp_path / "notes.md").touch()
    pairs = read(str(tmp_path))
    assert [pair.name for pair in pairs] == ["a/c.jpeg", "a/deep/d.WEBP", "b.png"]
    assert pairs[2].captions == ("one b.png", "two")


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("filepath", "title"), ()), (("path", "caption"), ()), (("image", "text"), ()),
        (("file_name", "text"), ()), (("url", "alt"), ("url", "alt")),
    ],
)  # fmt: skip
def test_columns_have_defaults_and_options(
    names: tuple[str, str], options: tuple[str, ...], tmp_path: Path
) -> None:
    """Relative paths are relative to the table, and several rows of an image are one pair. A
    spreadsheet's BOM is no part of a column's name."""
    image, caption = names
    table = tmp_path / "deep" / "pairs.csv"
    table.parent.mkdir()
    rows = f'{image},id,{caption}\n../a.png,7,"a, b"\n./../a.png,8,c\n{tmp_path}/b.png,9,é\n'
    table.write_text(rows, encoding="utf-8-sig")
    pairs = read(str(table), *options)
    found = {pair.place.file: pair.captions for pair in pairs}
    assert found == {str(tmp_path / "a.png"): ("a, b", "c"), str(tmp_path / "b.png"): ("é",)}


def test_a_caption_in_jsonl_may_be_a_list(tmp_path: Path) -> None:
    table = tmp_path / "pairs.jsonl"
    table.write_text(json.dumps({"path": "a.png", "caption": ["x", " y ", ""]}) + "\n\n")
    assert [pair.captions for pair in read(str(table))] == [("x", "y")]


def test_held_out_images_do_not_depend_on_their_order_or_company() -> None:
    pairs = [Pair(f"a/{k}.png", (f"{k}", 0, -1), ("x", "y"), "") for k in range(1000)]
    trained, held_out = hold_out(pairs, 0.1)
    assert len(trained) + len(held_out) == 1000 and 70 < len(held_out) < 130
    assert hold_out(pairs[::-1], 0.1)[1] == held_out
    assert {*hold_out(pairs[::2], 0.1)[1]} == {*held_out} & {*pairs[::2]}
    # More are added as the share grows, and another ending changes nothing.
    assert hold_out(pairs, 0.3)[1][: len(held_out)] == held_out
    others = [Pair(p.name.replace("png", "jpg"), p.place, p.captions, "") for p in pairs]
    assert [p.place for p in hold_out(others, 0.1)[1]] == [p.place for p in held_out]
    assert hold_out(pairs, 0.0) == (pairs, [])
