"""The demo's files."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")

from fastclip.demo import train
from fastclip.demo.emoji import figure
from fastclip.demo.loop import Run
from fastclip.demo.workers import ALONE


def test_a_figure_that_fails_leaves_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no figure")

    monkeypatch.setattr(figure, "draw", broken)
    monkeypatch.setattr(train, "held_out_features", lambda *_: None)
    task = SimpleNamespace(workers=ALONE, emoji=None, split=None, encode=None)
    runs = {"fused": Run([2.0, 1.0], [1.0, 1.0])}
    with pytest.raises(RuntimeError, match="no figure"):
        train.write_results(
            Namespace(out=tmp_path), task, runs, tmp_path / "clip.safetensors", None, {}, 0.0
        )
    assert json.loads((tmp_path / "results.json").read_text())["losses"] == {"fused": [2.0, 1.0]}
