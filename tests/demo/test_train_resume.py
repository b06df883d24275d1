"""A training that is resumed from its file equals an uninterrupted one, bit for bit."""

import io
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import demo_task

import fastclip.loss
from fastclip.demo.checkpoint import Checkpoint
from fastclip.demo.emoji.batches import Batch, Batches
from fastclip.demo.train import Task, main

OPTIONS = ["--steps", "6", "--batch-size", "24", "--lr", "2e-3", "--no-compare"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    task = demo_task.small()

    def load(device: torch.device, workers: Any) -> Task:
        return replace(task, workers=workers)

    monkeypatch.setattr(Task, "load", load)


def interrupted_at(step: int, by: Callable[[], None]) -> Callable[..., torch.Tensor]:
    """Returns the fused loss, with a call of `by` before its value at a step."""
    calls = iter(range(1, 1 + step))
    fused = fastclip.loss.clip_loss

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        if next(calls) == step:
            by()
        return fused(*inputs)

    return loss


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def die() -> None:
    raise MemoryError


@pytest.mark.parametrize("options", [[], ["--micro-batch", "10"]], ids=["whole", "micro"])
@pytest.mark.parametrize(
    ("by", "step", "kept"), [(ctrl_c, 3, 3), (die, 6, 4)], ids=["interrupted", "killed"]
)
def test_a_resumed_training_equals_an_uninterrupted_one(
    by: Callable, step: int, kept: int, options: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Ctrl-C during a step saves the state after it. Any other error leaves the last state written
    by --checkpoint-every."""
    command = [*OPTIONS, *options, "--checkpoint-every", "4", "--out", str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises((SystemExit, MemoryError)):
            patch.setattr(fastclip.loss, "clip_loss", interrupted_at(step, by))
            main(command)
    finally:
        signal.signal(signal.SIGINT, before)
    if by is ctrl_c:
        assert "stopped after 3 steps" in (error := capsys.readouterr().err)
        assert "--resume continues from training.pt" in error
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert len(state["run"]["losses"]) == kept
    main([*command, "--resume"])
    assert f"continues after step {kept} of 6\n" in capsys.readouterr().out
    micro_batch = int(options[1]) if options else None
    unbroken = demo_task.trained(
        demo_task.small(), 24, steps=6, lr=2e-3, micro_batch=micro_batch
    ).losses
    assert json.loads((tmp_path / "results.json").read_text())["losses"]["fused"] == unbroken
    assert unbroken[:kept] == state["run"]["losses"] and len(set(unbroken)) == 6
    assert not list(tmp_path.glob("*.pt*"))  # a finished training removes its state


def test_checkpoint_every_0_writes_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastclip.loss, "clip_loss", interrupted_at(3, die))
    with pytest.raises(MemoryError):
        main([*OPTIONS, "--checkpoint-every", "0", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["clip.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--lr", "1e-3", "--seed", "7"],
            "settings must be those of FILE: lr 0.002, seed 0, got lr 0.001, seed 7",
        ),
        (["--micro-batch", "8"], "FILE: micro_batch None, got micro_batch 8"),
        (
            ["--implementation", "dense"],
            "FILE: implementation fused, got implementation dense",
        ),
        (["--loss", "siglip"], "FILE: loss clip, got loss siglip"),
    ],
)
def test_resuming_with_other_settings_is_reported_in_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "training.pt"
    settings = {
        "steps": 6, "batch_size": 24, "micro_batch": None, "lr": 2e-3, "loss": "clip",
        "implementation": "fused", "seed": 0, "matching": "none",
    }  # fmt: skip
    Checkpoint(file, settings, {}).save({})
    assert_one_line(tmp_path, options, message.replace("FILE", str(file)), capsys)


@pytest.mark.parametrize("content", [None, b"", b"no such thing", "a list"])
def test_a_missing_or_wrong_state_is_reported_in_one_line(
    content: bytes | str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "training.pt"
    message = f"{file} must exist to resume from, got no such file"
    if content is not None:
        message = f"{file} must be a saved training state: "
        if content == "a list":
            torch.save([1, 2], file)
        else:
            file.write_bytes(content)
    assert_one_line(tmp_path, [], message, capsys)


def assert_one_line(
    out: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        main([*OPTIONS, *options, "--out", str(out), "--resume"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error and error.count("\n") == 1, error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_restart_by_torchrun_resumes_by_itself(
    restarts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A restart resumes if the file fits its settings. A first start does not resume."""
    for name, value in {
        "TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": str(restarts),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for lr, fits in ("2e-3", True), ("1e-3", False):
        with monkeypatch.context() as patch:
            patch.setattr(fastclip.loss, "clip_loss", interrupted_at(3, die))
            with pytest.raises(MemoryError):
                main([*OPTIONS, "--checkpoint-every", "1", "--out", str(tmp_path)])
            capsys.readouterr()
            patch.setattr(fastclip.loss, "clip_loss", interrupted_at(1, die))
            with pytest.raises(MemoryError):
                main([*OPTIONS, "--lr", lr, "--checkpoint-every", "1", "--out", str(tmp_path)])
        resumed = "continues after step 2" in capsys.readouterr().out
        assert resumed == (bool(restarts) and fits)
        (tmp_path / "training.pt").unlink()


def test_an_unfinished_write_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path / "training.pt", {"steps": 1}, {})
    checkpoint.save({})
    save = torch.save

    def write_half(state: Any, path: Path) -> None:
        save(state, path)
        os.truncate(path, os.path.getsize(path) // 2)
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save({})
    assert checkpoint.load()["settings"] == {"steps": 1}


def stream(rows: slice = slice(None), size: int = 700, seed: int = 5) -> Batches:
    task = demo_task.small()
    return Batches(task.emoji, task.split, task.encode, size, seed, rows=rows)


def same(a: Batch, b: Batch) -> bool:
    drawn = (a.concepts, a.vendors, a.captions) == (b.concepts, b.vendors, b.captions)
    return drawn and torch.equal(a.images, b.images) and torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_stream_continues_from_its_state(taken: int) -> None:
    """Two batches are an epoch: the state is that before, within and after an epoch."""
    whole, file = stream(), io.BytesIO()
    for _ in range(taken):
        next(whole)
    torch.save(whole.state_dict(), file)
    file.seek(0)
    other = stream(seed=6)
    next(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    wanted = [next(whole) for _ in range(3)]
    assert all(same(next(other), batch) for batch in wanted)
    assert not same(wanted[0], wanted[1])


def test_slices_equal_those_of_the_whole_batch() -> None:
    """A slice has the pairs and the noise that the whole batch has there."""
    whole, parts = stream(size=9), [stream(rows, size=9) for rows in (slice(0, 5), slice(5, 9))]
    for _ in range(3):
        batch, slices = next(whole), [next(part) for part in parts]
        # Products of fewer matrices may round differently.
        images = torch.cat([part.images for part in slices])
        torch.testing.assert_close(images, batch.images, rtol=0, atol=1e-5)
        for part, tokens in zip(slices, batch.tokens.split([5, 4]), strict=True):
            length = part.tokens.shape[1]  # the length of the slice's longest caption
            assert torch.equal(part.tokens, tokens[:, :length])
            assert len(part.images) == len(part.tokens)
        assert {part.captions for part in slices} == {batch.captions}
    assert same(next(stream(size=9)), next(stream(slice(0, 9), size=9)))
