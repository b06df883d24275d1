"""Trainings on one's own pairs: files, losses, interruption and resumption, two processes."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import pairs_task
from support.exported_emoji import export
from support.installation import ROOT
from support.pairs_task import TINY
from support.ranks.processes import Ranks

import fastclip.loss
from fastclip.clip.model import CLIP
from fastclip.clip.tokenizer import Tokenizer
from fastclip.demo import emoji
from fastclip.pairs.evaluate import features
from fastclip.pairs.pair import LeftOut
from fastclip.pairs.source import read_pairs
from fastclip.train import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return export(tmp_path_factory.mktemp("emoji"), "csv")


def test_end_to_end(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the code of the page on it."""
    broken = next(Path(source).parent.glob("*.png"))
    whole = broken.read_bytes()
    with Image.open(broken) as image:
        image.save(broken, exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00")
    with open(source, "a") as file:
        file.write("nowhere.png,lost\n")
    out = tmp_path / "deep" / "trained"
    command = [sys.executable, "-m", "fastclip.train", "--pairs", source, *TINY, "--workers", "2"]
    done = subprocess.run(
        [*command, "--out", str(out), "--held-out", "0.4"], capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    broken.write_bytes(whole)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    names = {"clip.safetensors", "tokenizer.json", "results.json", "pairs.png"}
    assert {path.name for path in out.iterdir()} == names
    for expected in ("1 left out, the image's file cannot be read", "text to image R@1", *names):
        assert expected in done.stdout, done.stdout
    results = json.loads((out / "results.json").read_text())
    assert results["losses"] == pairs_task.curve(source, "--held-out", "0.4")
    assert (
        results["scores"].keys() == results["chance"].keys() == results["evaluations"]["4"].keys()
    )
    assert results["images"]["trained"] + results["images"]["held_out"] == 40
    assert results["evaluations"].keys() == {"2", "4"} and results["settings"]["held_out"] == 0.4
    with Image.open(out / "pairs.png") as picture:
        assert picture.width > 1000 and len(picture.convert("L").getcolors()) > 100
    model, tokenizer = CLIP.load(out / "clip.safetensors"), Tokenizer(out / "tokenizer.json")
    assert model.config.vocab_size == tokenizer.vocab_size == 300
    task = pairs_task.loaded(
        source, "--held-out", "0.4", "--tokenizer", str(out / "tokenizer.json")
    )
    held_out = task.held_out_set()
    found = features(model, held_out, held_out.pixels(task.workers, 0), task.encode, task.workers)
    assert held_out.scores(found) == pytest.approx(results["scores"])
    assert model.training

    data = emoji.load()
    few = replace(data, concepts=data.concepts[:30], drawings=data.drawings[:30])
    monkeypatch.setattr(emoji, "load", lambda: few)
    monkeypatch.chdir(out.parent)
    names = {}
    codes = re.findall(r"```py\n(.*?)```", (ROOT / "docs/own-pairs.md").read_text(), re.DOTALL)
    for code in codes:
        exec(code, names)
    assert len(codes) == 2 and len(read_pairs("emoji", LeftOut())) == len(names["paths"]) == 30


@pytest.mark.parametrize("loss", ["clip_ids", "siglip", "global"])
@pytest.mark.parametrize("options", [(), ("--micro-batch", "4")], ids=["whole", "micro"])
def test_losses_and_micro_batches(loss: str, options: tuple[str, ...], source: str) -> None:
    fused = pairs_task.curve(source, "--loss", loss, *options)
    dense = pairs_task.curve(source, "--loss", loss, "--implementation", "dense")
    assert fused == pytest.approx(dense, rel=2e-4) and len(set(fused)) == 5


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def die() -> None:
    raise MemoryError


def at_step(step: int, by: Callable[[], None]) -> Callable[..., torch.Tensor]:
    """Returns the fused loss, with a call of `by` before its value at a step."""
    calls = iter(range(1, 1 + step))
    fused = fastclip.loss.clip_loss

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        if next(calls) == step:
            by()
        return fused(*inputs)

    return loss


@pytest.mark.parametrize(
    ("by", "step", "kept", "processes"), [(ctrl_c, 3, 3, 1), (die, 5, 3, 0)],
    ids=["interrupted", "killed"],
)  # fmt: skip
def test_a_resumed_training_equals_an_uninterrupted_one(
    by: Callable, step: int, kept: int, processes: int, source: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("fastclip.pairs.figure.draw", lambda path, *_: path.touch())
    command = ["--pairs", source, *TINY, "--checkpoint-every", "3", "--out", str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises((SystemExit, MemoryError)):
            patch.setattr(fastclip.loss, "clip_loss", at_step(step, by))
            main([*command, "--workers", str(processes)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert {p.name for p in tmp_path.iterdir()} == {
        "clip.safetensors", "tokenizer.json", "training.pt"
    }  # fmt: skip
    if by is ctrl_c:
        assert "stopped after 3 steps" in (error := capsys.readouterr().err)
        assert "--resume continues from training.pt" in error
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert len(state["run"]["losses"]) == kept
    # Other images to train on are another training.
    with pytest.raises(SystemExit):
        main([*command, "--resume", "--held-out", "0.5"])
    assert "training.pt: held_out 0.1, pairs " in capsys.readouterr().err.splitlines()[-1]
    main([*command, "--resume"])
    assert f"continues after step {kept} of 5\n" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["losses"] == pairs_task.curve(source) and len(set(results["losses"])) == 5
    assert results["evaluations"].keys() == {"2", "4"}
    assert not list(tmp_path.glob("*.pt*"))


@pytest.mark.parametrize("options", [[], ["--micro-batch", "3"], ["--loss", "clip_ids"]], ids=str)
def test_two_processes_have_the_curve_of_one(
    options: list[str], two: Ranks, source: str, tmp_path: Path
) -> None:
    """One of them has five pairs of a batch, the other four; each checks and decodes its own."""
    table = Path(source).with_name("with_gaps.csv")
    table.write_text(Path(source).read_text() + "gone.png,a\nlost.png,b\n")
    (table.parent / "lost.png").write_text("no image")
    alone = pairs_task.loaded(str(table), *options)
    curve = pairs_task.trained(alone)
    found = two.run(pairs_task.found_by_a_rank, str(table), options)
    model, _, _ = alone.start()
    held_out = alone.held_out_set()
    wanted = features(
        model, held_out, held_out.pixels(alone.workers, 0), alone.encode, alone.workers
    )
    for losses, left_out, _, rows in found:
        assert losses == pytest.approx(curve, rel=2e-5)
        assert left_out == alone.left_out.counts and len(left_out) == 2
        for a, b in zip(rows, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert found[0][0] == found[1][0] and [count for *_, count, _ in found] == [5, 4]


def test_held_out_pairs_are_optional(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The model, which may be large, is built once."""
    built = []
    monkeypatch.setattr("fastclip.pairs.task.CLIP", lambda c: built.append(c) or CLIP(c))
    main(["--pairs", source, *TINY, "--steps", "1", "--held-out", "0", "--out", str(tmp_path)])
    assert "R@1" not in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["scores"] == {}
    assert len(built) == 1
