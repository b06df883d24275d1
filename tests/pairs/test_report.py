"""The lines and files of a training on one's own pairs."""

import json
from pathlib import Path

import pytest
from support import pairs_task
from support.exported_emoji import export
from support.pairs_task import TINY

from fastclip.pairs.report import cut_captions
from fastclip.train import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return export(tmp_path_factory.mktemp("emoji"), "csv")


def test_captions_that_are_cut_are_counted(source: str) -> None:
    with open(source) as file:
        header, first, *_ = file.read().splitlines()
    table = Path(source).with_name("cut.csv")
    image = first.split(",")[0]
    # In tokens, with <start> and <end>: 3, 4 and 5.
    table.write_text("\n".join([header, f"{image},a", f"{image},b b", f"{image},c c c"]))
    for length, line in (
        (3, "66.7% of captions are cut to --context-length 3 tokens"),
        (4, "33.3% of captions are cut to --context-length 4 tokens"),
        (5, None),
    ):
        task = pairs_task.loaded(str(table), "--held-out", "0", "--context-length", str(length))
        assert cut_captions(task) == ([line] if line else [])


def test_a_figure_that_fails_leaves_the_results(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no figure")

    monkeypatch.setattr("fastclip.pairs.figure.draw", broken)
    with pytest.raises(RuntimeError, match="no figure"):
        main(["--pairs", source, *TINY, "--steps", "1", "--out", str(tmp_path)])
    assert len(json.loads((tmp_path / "results.json").read_text())["losses"]) == 1
