"""The demo under torchrun: one process's curve, messages from one rank, restarts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import demo_task
from support.ranks.processes import Ranks

from fastclip.demo.checkpoint import Checkpoint
from fastclip.demo.command_line import parser
from fastclip.demo.losses import IMPLEMENTATIONS, LOSSES
from fastclip.demo.train import DECISIVE, Task, main
from fastclip.demo.workers import Workers

TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
]  # fmt: skip


@pytest.mark.parametrize("batch_size", [32, 33], ids=["even", "uneven"])
@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch": 7}, {"implementation": "dense"}],
    ids=["fused", "micro", "dense"],
)
def test_the_curve_of_one_process(two: Ranks, options: dict[str, Any], batch_size: int) -> None:
    options = {"steps": 8, **options}
    alone = demo_task.trained(demo_task.small(), batch_size, **options).losses
    first, second = two.run(demo_task.curve, batch_size, options)
    assert first == second == pytest.approx(alone, rel=2e-5)
    assert alone[-1] < alone[0] and len(set(alone)) == 8
    # Ranks with the same slice, or with other pairs, would differ by far more.
    other = demo_task.trained(demo_task.small(), batch_size, **{**options, "seed": 1}).losses
    assert other != pytest.approx(alone, rel=1e-3)


def test_buckets_of_gradients_have_one_order_from_the_first_step_on(two: Ranks) -> None:
    """Three or more ranks add in an order that depends on it, and any step may be the first one
    after a resumption."""
    first, second, third = two.run(demo_task.bucket_layouts, 3)[0]
    assert first == second == third
    places = [place for bucket in first for place in bucket]
    assert sorted(places) == list(range(len(list(demo_task.small().start(0, 8)[0].parameters()))))


def test_all_ranks_get_the_first_ranks_result_or_error(two: Ranks) -> None:
    results = [{"a": torch.ones(2)}, ValueError("no"), FileNotFoundError("none"), None]
    for received in two.run(demo_task.received_from_first, results):
        assert torch.equal(received[0]["a"], torch.ones(2))
        assert received[1:] == ["ValueError: no", "FileNotFoundError: none", None]


def test_a_stop_requested_on_one_rank_stops_all(two: Ranks) -> None:
    for stopped, found in two.run(demo_task.stop_requested_on_the_last_rank):
        assert stopped == 1 and found == (0.5, True)


def test_gradients_outside_of_ddp_are_averaged(two: Ranks) -> None:
    assert two.run(demo_task.averaged_gradient) == [1.5, 1.5]


def test_a_lone_worker_has_no_group() -> None:
    assert not demo_task.groups_of_a_lone_worker()
    assert Workers.launched() == Workers()


def test_slices_cover_the_batch() -> None:
    for batch_size in range(5, 13):
        slices = [Workers(rank, 5).rows(batch_size) for rank in range(5)]
        pairs = [i for rows in slices for i in range(batch_size)[rows]]
        assert pairs == list(range(batch_size))
        sizes = [rows.stop - rows.start for rows in slices]
        assert max(sizes) - min(sizes) <= 1 and sizes == Workers(0, 5).sizes(batch_size)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "2"], "batch size must be at least 1 for each of 3 ranks, got 2"),
        (["--device", "cuda:1"], "device must be cpu or cuda with 3 ranks, got 'cuda:1'"),
        (["--device", "cuda"], "device 'cuda' must be a GPU for each of 3 ranks, got 2"),
        (["--steps", "0"], "argument --steps: must be at least 1, got 0"),
    ],
)
def test_a_wrong_option_is_reported_in_one_line_by_the_first_rank(
    rank: int, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    task = demo_task.small()
    workers = Workers(rank, 3, rank, 3)
    monkeypatch.setattr(Workers, "launched", classmethod(lambda cls: workers))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(Task, "load", lambda _, workers: replace(task, workers=workers))
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == (rank == 0)
    assert message in error or rank > 0


def checkpoint_of(command: list[str], out: Path, every: int = 0) -> tuple[Checkpoint, dict]:
    """Returns the demo's checkpoint for a command, and the options that determine its curve."""
    args = vars(parser(LOSSES, IMPLEMENTATIONS).parse_args(command))
    settings = {name: args[name] for name in DECISIVE}
    place = {"ranks": 2, "threads": 1, "device": "cpu"}
    del args["batch_size"]
    options = {name: args[name] for name in DECISIVE if name in args}
    return Checkpoint(out / "training.pt", settings, place, every), options


def launched(command: list[str], out: Path, *elastic: str, **streams: Any) -> subprocess.Popen:
    return subprocess.Popen(
        [*TORCHRUN, *elastic, "-m", "fastclip.train", *command, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        preexec_fn=demo_task.heed_interrupts, **streams,
    )  # fmt: skip


def children(process: subprocess.Popen) -> list[int]:
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds ranks in Linux's /proc")
def test_training_survives_a_killed_rank_and_saves_at_ctrl_c(two: Ranks, tmp_path: Path) -> None:
    """One rank gets SIGKILL, torchrun restarts all, and then torchrun gets SIGINT."""
    command = ["--steps", "100000", "--batch-size", "9", "--checkpoint-every", "2"]
    file, stdout, stderr = (tmp_path / name for name in ("training.pt", "stdout", "stderr"))
    with stdout.open("w") as out, stderr.open("w") as error:
        process = launched(command, tmp_path, "--max-restarts", "1", stdout=out, stderr=error)

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 100
        while not condition():
            assert process.poll() is None and time.monotonic() < deadline, stderr.read_text()
            time.sleep(0.02)

    ranks: list[int] = []
    try:
        wait_for(file.exists)
        ranks = children(process)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        wait_for(lambda: "continues after step" in stdout.read_text())
        ranks += children(process)
        before = file.stat().st_mtime_ns
        wait_for(lambda: file.stat().st_mtime_ns != before)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        for rank in ranks[2:]:  # they outlive torchrun
            if Path(f"/proc/{rank}").exists():
                os.kill(rank, signal.SIGKILL)
    last = stderr.read_text().split("death signal")[-1]
    assert "[rank" not in last and "fastclip/" not in last.replace(str(tmp_path), "")
    assert last.count("stopped after") == last.count("holds the model so far; --resume") == 1
    kept = torch.load(file, weights_only=True)
    losses = kept["run"]["losses"]
    assert len(losses) >= 5 and f"stopped after {len(losses)} steps" in last
    checkpoint, options = checkpoint_of(command, tmp_path / "unbroken")
    unbroken = two.run(demo_task.curve_and_state, 9, checkpoint, 1, options, len(losses))
    assert unbroken[0] == losses and len(set(losses)) == len(losses)


def test_resumed_ranks_finish_and_one_prints(two: Ranks, tmp_path: Path) -> None:
    """Batches have nine pairs: one rank has five, the other four."""
    command = ["--steps", "6", "--batch-size", "9", "--seed", "3"]
    checkpoint, options = checkpoint_of(command, tmp_path, every=3)
    unbroken, _ = two.run(demo_task.curve_and_state, 9, checkpoint, 3, options)
    process = launched(
        [*command, "--resume"], tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    names = {"clip.safetensors", "results.json", "demo.png", "retrieval.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["losses"]["fused"] == unbroken and results["ranks"] == 2
    assert results["losses"]["dense"] == pytest.approx(unbroken[:1], rel=1e-4)
    alone = demo_task.trained(demo_task.whole(), 9, **options).losses
    assert unbroken == pytest.approx(alone, rel=1e-4)
    for message in (
        "2 ranks of 1 thread\n",
        "continues after step 3 of 6\n",
        "held out of",
        " in all;",
    ):
        assert out.count(message) == 1, out
    assert error.count("| 3/6 ") == 1 and "Traceback" not in error and "[rank" not in error
