"""Tables: quotes, and the names of images."""

from pathlib import Path

import pytest

from fastclip.pairs.pair import LeftOut, hold_out
from fastclip.pairs.source import read_pairs


def test_a_tsv_has_no_quoting(tmp_path: Path) -> None:
    table = tmp_path / "pairs.tsv"
    table.write_text('path\ttext\na.png\t"unclosed\nb.png\t"Best" day 7\nc.png\tc\n')
    left_out = LeftOut()
    found = [pair.captions for pair in read_pairs(str(table), left_out)]
    assert found == [('"unclosed',), ('"Best" day 7',), ("c",)] and not left_out.counts


def test_a_quote_that_swallows_rows(tmp_path: Path) -> None:
    """The next quote at the end of a cell closes it. A caption may have lines of its own."""
    table = tmp_path / "pairs.csv"
    rows = [f"{k}.png,caption {k}\n" for k in range(5)]
    poem = '"one,\ntwo,\nthree\nfour,\nfive"\n'
    table.write_text(
        "path,text\n" + f'a.png,"unclosed\n{"".join(rows)}b.png,5"\nc.png,c\nd.png,{poem}'
    )
    left_out = LeftOut()
    c, d = read_pairs(str(table), left_out)
    assert c.captions == ("c",) and d.captions == ("one,\ntwo,\nthree\nfour,\nfive",)
    assert left_out.lines() == ["1 left out, rows inside a quoted cell: lines 2 to 8"]


@pytest.mark.parametrize("quoted", ['"a "dog" runs"', '"a dog" runs', '"a dog'])
def test_a_wrong_quote_is_an_error_with_its_line(quoted: str, tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text(f'path,text\na.png,"x ""y"""\nb.png,{quoted}\nc.png,"c"\n')
    with pytest.raises(ValueError, match=r"pairs.csv must be a table whose quotes .* line 3 on"):
        read_pairs(str(table), LeftOut())


def test_names_do_not_depend_on_the_place_of_the_data(tmp_path: Path) -> None:
    """Paths may be relative or absolute, inside or outside of the table's folder."""
    found = []
    for place in ("a", "deep/b"):
        data, tables = tmp_path / place, tmp_path / "tables"
        data.mkdir(parents=True)
        tables.mkdir(exist_ok=True)
        rows = [(f"{k % 3}/{k}.png", f"caption {k}") for k in range(60)]
        inside, absolute, outside = data / "x.csv", data / "y.csv", tables / "z.csv"
        inside.write_text("path,text\n" + "".join(f"{p},{t}\n" for p, t in rows))
        for table in (absolute, outside):
            table.write_text("path,text\n" + "".join(f"{data}/{p},{t}\n" for p, t in rows))
        for table in (inside, absolute, outside):
            pairs = read_pairs(str(table), LeftOut())
            assert {pair.name for pair in pairs} == {p for p, _ in rows}
            assert {pair.place.file for pair in pairs} == {f"{data}/{p}" for p, _ in rows}
            found.append([pair.name for pair in hold_out(pairs, 0.3)[1]])
    assert len(found) == 6 and all(names == found[0] for names in found) and found[0]


def test_a_path_written_in_two_ways_is_one_image(tmp_path: Path) -> None:
    rows = [f"{tmp_path}/a.png,x", "../a.png,y", f"{tmp_path}/b/c.png,z"]
    (tmp_path / "t").mkdir()
    for order in (rows, rows[::-1]):
        (tmp_path / "t" / "pairs.csv").write_text("\n".join(["path,text", *order]))
        pairs = read_pairs(str(tmp_path / "t" / "pairs.csv"), LeftOut())
        assert {p.name: p.captions for p in pairs} == {"../a.png": ("x", "y"), "b/c.png": ("z",)}
