"""The demo on one process: equal curves, learning, evaluation, interruptions, wrong options."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import demo_task

import fastclip.loss
from fastclip.clip.model import CLIP
from fastclip.clip.zero_shot import class_features, classify
from fastclip.demo.emoji.evaluate import CATEGORY_WORDS, evaluate, pictures
from fastclip.demo.loop import Run, optimizer_for, rate, train
from fastclip.demo.train import Task, main

RUN = [sys.executable, "-m", "fastclip.train"]


@pytest.fixture(scope="module")
def task() -> Task:
    return demo_task.small()


def trained(task: Task, implementation: str, seed: int = 0, steps: int = 12) -> Run:
    return demo_task.trained(task, 48, implementation=implementation, seed=seed, steps=steps)


def test_fused_and_dense_curves_agree(task: Task) -> None:
    fused, dense = trained(task, "fused"), trained(task, "dense")
    assert len(fused.losses) == len(dense.losses) == 12
    # The two round differently, and the difference grows a little at each step.
    assert fused.losses == pytest.approx(dense.losses, rel=2e-4)
    assert fused.scales == pytest.approx(dense.scales, rel=1e-5)
    # The agreement is a test only if the losses change and differ between seeds.
    assert fused.losses[-1] < fused.losses[0] - 0.05
    assert trained(task, "fused", seed=1).losses != pytest.approx(fused.losses, rel=2e-4)


def test_micro_batches_give_the_same_curve(task: Task) -> None:
    """The towers hold 20 of 48 pairs at once. The model has no dropout."""
    runs = []
    for micro_batch in (None, 20):
        model, stream = task.start(0, batch_size=48)
        runs.append(Run())
        train(
            model,
            stream,
            task.batch_loss("fused", 48),
            runs[-1],
            steps=6,
            lr=1e-3,
            micro_batch=micro_batch,
        )
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-4)
    assert runs[0].losses[-1] < runs[0].losses[0]


def test_training_is_repeatable(task: Task) -> None:
    assert trained(task, "fused", steps=4).losses == trained(task, "fused", steps=4).losses


def test_it_learns_a_few_concepts_by_heart(task: Task) -> None:
    few = dict(list(task.split.vendors.items())[:24])
    small = replace(task, split=replace(task.split, vendors=few))
    model, stream = small.start(0, batch_size=24)
    run = Run()
    train(model, stream, small.batch_loss("fused", 24), run, steps=120, lr=3e-3)
    first, last = sum(run.losses[:5]) / 5, sum(run.losses[-5:]) / 5
    assert last < first / 4, (first, last)
    assert max(run.scales) <= 100.001
    with torch.no_grad():
        batch = next(stream)
        out = model(batch.images, batch.tokens)
    nearest = (out["image_features"] @ out["text_features"].T).argmax(dim=1)
    assert (nearest == torch.arange(24)).float().mean() > 0.8


def test_the_scale_is_clamped_while_training(task: Task) -> None:
    model, stream = task.start(0, batch_size=8)
    torch.nn.init.constant_(model.logit_scale, 9.0)
    run = Run()
    train(model, stream, task.batch_loss("fused", 8), run, steps=1, lr=1e-3)
    assert run.scales == pytest.approx([100.0])


def test_schedule_and_decay(task: Task) -> None:
    rates = [rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) <= 1 and rates[-1] < 1e-3
    assert rates.index(max(rates)) == 9
    assert rate(0, 1) == 1.0
    model, _ = task.start(0, batch_size=8)
    decayed, others = optimizer_for(model, 1e-3).param_groups
    assert decayed["weight_decay"] > 0 == others["weight_decay"]
    assert any(p is model.logit_scale for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_an_untrained_model_scores_about_chance(task: Task) -> None:
    model, _ = task.start(0, batch_size=8)
    scores = evaluate(model, task.emoji, task.split, task.encode)
    assert set(scores) == {"other vendor", "held out", "zero-shot"}
    one, held = len(task.split.one_vendor), len(task.split.held_out)
    for test, count, queries in (("other vendor", one, one), ("held out", held, 2 * held)):
        assert len(scores[test]) == 4
        for name, score in scores[test].items():
            assert score.chance == pytest.approx(int(name[-1]) / count)
            assert score.queries == queries
            assert score.value < 0.1  # an untrained model guesses
    (accuracy,) = scores["zero-shot"].values()
    assert accuracy.chance == pytest.approx(1 / 9) and accuracy.value < 0.4


def test_demo_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "folder"
    command = [*RUN, "--steps", "4", "--batch-size", "32", "--out", str(out), "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names = {"clip.safetensors", "results.json", "demo.png", "retrieval.png"}
    assert {path.name for path in out.iterdir()} == names
    for expected in ("held out", "R@1", "chance", "categories", "dense loss", *names):
        assert expected in done.stdout, done.stdout
    assert re.search(r"loss \d\.\d+, scale \d+\.\d, [\d,]+ pairs/s", done.stderr)

    results = json.loads((out / "results.json").read_text())
    fused, dense = results["losses"]["fused"], results["losses"]["dense"]
    assert len(fused) == 4 and dense == pytest.approx(fused[: len(dense)], rel=1e-4)
    assert results["settings"]["seed"] == 5
    assert results["scores"]["held out"]["image to text R@1"]["chance"] < 0.01
    for name in ("demo.png", "retrieval.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 1000 and len(picture.convert("L").getcolors()) > 100

    model = CLIP.load(out / "clip.safetensors")
    task = Task.load()
    assert model.config == task.config
    classes = class_features(model, task.encode, CATEGORY_WORDS)
    guesses = classify(model, pictures(model, task.emoji, [0, 1, 2], [0, 1, 0]), classes)
    assert guesses.shape == (3,) and guesses.max() < len(CATEGORY_WORDS)


def test_interrupting_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    command = [*RUN, "--steps", "100000", "--batch-size", "16", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=demo_task.heed_interrupts,
    )  # fmt: skip
    os.set_blocking(process.stderr.fileno(), False)
    seen, deadline = b"", time.monotonic() + 100
    while b"pairs/s" not in seen:
        assert process.poll() is None and time.monotonic() < deadline, seen.decode()
        time.sleep(0.05)
        seen += process.stderr.read() or b""
    process.send_signal(signal.SIGINT)
    code = process.wait(timeout=60)
    error = (seen + (process.stderr.read() or b"")).decode()
    process.stderr.close()
    assert code == 130
    assert "Traceback" not in error
    assert "stopped after" in error and "clip.safetensors" in error
    assert {path.name for path in tmp_path.iterdir()} == {"clip.safetensors", "training.pt"}
    model = CLIP.load(tmp_path / "clip.safetensors")
    fresh, _ = Task.load().start(0, 16)
    # The file holds the trained model, not the initial one.
    assert not torch.equal(model.logit_scale, fresh.logit_scale)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("where", ["load", "first start", "second start", "first step"])
def test_interrupting_before_the_first_step_saves_nothing(
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: Task,
) -> None:
    starts = iter(["first start", "second start"])

    def interrupt_at(place: str) -> None:
        if place == where:
            raise KeyboardInterrupt

    def load(*_: object) -> Task:
        interrupt_at("load")
        return task

    start = Task.start

    def interrupted_start(self: Task, seed: int, batch_size: int) -> tuple:
        interrupt_at(next(starts))
        return start(self, seed, batch_size)

    def loss(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Task, "load", load)
    monkeypatch.setattr(Task, "start", interrupted_start)
    monkeypatch.setattr(fastclip.loss, "clip_loss", loss)
    earlier = tmp_path / "clip.safetensors"
    earlier.write_bytes(b"an earlier run's")
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path), "--steps", "1", "--batch-size", "8", "--no-compare"])
    assert stopped.value.code == 130
    error = capsys.readouterr().err
    assert "stopped after 0 steps; nothing was saved" in error and "clip.safetensors" not in error
    assert earlier.read_bytes() == b"an earlier run's"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["--steps", "many"], "argument --steps: invalid whole number value: 'many'"),
        (["--lr", "2"], "argument --lr: must be between 0 and 1, got 2"),
        (["--batch-size", "1"], "batch size must be from 2 to 1588, got 1"),
        (["--batch-size", "4000"], "batch size must be from 2 to 1588, got 4000"),
        (["--device", "toaster"], "cannot use device 'toaster': "),
        (["--device", "cuda:99"], "cannot use device 'cuda:99': "),
        (["--loss", "klip"], "argument --loss: invalid choice: 'klip'"),
        (["--implementation", "dens"], "argument --implementation: invalid choice: 'dens'"),
        (["--checkpoint-every", "-1"], "argument --checkpoint-every: must be at least 0, got -1"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--out", "FILE/below"], "FILE"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocker = tmp_path / "FILE"
    blocker.write_text("in the way")
    options = [option.replace("FILE", str(blocker)) for option in options]
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "out"), "--steps", "1", "--no-compare", *options])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error and error.count("\n") == 1
    assert error.startswith("python -m fastclip.train: ")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    options = re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.MULTILINE)
    assert {"--steps", "--batch-size", "--lr", "--loss", "--no-compare", "--out"} <= set(options)
    # Every option has a description: argparse prints it beside the option or on the next line.
    assert all(re.search(rf"{option}.*?\s{{2,}}\w", text, re.DOTALL) for option in options)
