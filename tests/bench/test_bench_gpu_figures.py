"""The files of a run besides the rows: rates, kernels by time, counters of Nsight Compute."""

from pathlib import Path

import pytest
from support.bench.rehearsal import NCU

from bench.gpu import counters, figures, kernels, rates


def test_half_a_line_is_dropped_and_columns_are_checked(tmp_path):
    path = tmp_path / "figures.csv"
    figures.append(path, {"step": "rates", "name": "a, b", "value": 1.23456789, "unit": "x\ny"})
    figures.append(path, {"step": "rates"})
    with path.open("a") as file:
        file.write("rates,half")
    assert figures.read(path) == [
        {"step": "rates", "subject": "", "name": "a, b", "value": "1.23457", "unit": "x y"},
        {"step": "rates", "subject": "", "name": "", "value": "", "unit": ""},
    ]
    with pytest.raises(ValueError, match=r"expected columns of .* got \['other'\]"):
        figures.append(path, {"other": 1})
    assert figures.read(tmp_path / "none.csv") == []


def test_an_errors_reason_is_its_first_cause():
    try:
        try:
            raise TypeError("cannot convert\nto tensor")
        except TypeError as error:
            raise RuntimeError("at 19:4: a page of source") from error
    except RuntimeError as error:
        assert figures.reason(error) == "TypeError: cannot convert to tensor"


def test_rates_are_work_over_time(monkeypatch):
    monkeypatch.setitem(rates.CLOCKS, "cpu", lambda run, repeats: 0.5)
    assert rates.rate(100.0, lambda: None, "cpu") == (200.0, 0.5)
    works = [work[:3] for work in rates.works("cpu") if work[3]() is not NotImplemented]
    cube = 2 * 64**3 / 1e12
    assert works[:3] == [
        ("copy, read and written", 2 * 2**20 / 1e9, "GB/s"),  # a MiB each way
        ("64^3 bf16", cube, "TFLOP/s"), ("64^3 fp16", cube, "TFLOP/s"),
    ]  # fmt: skip
    flops = 2 * 128 * 128 * 32 / 1e12
    assert works[-1] == ("w^T x 128x128x32 bf16 to fp32", flops, "TFLOP/s")


def test_a_failing_matmul_is_reported_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    def fail() -> None:
        raise RuntimeError("no such product\nin this torch")

    works = [("one", 1.0, "TFLOP/s", fail), ("two", 1.0, "TFLOP/s", lambda: None)]
    monkeypatch.setattr(rates, "works", lambda device: iter(works))
    assert rates.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "FAILED: one: no such product\n" in capsys.readouterr().out
    rows = {(r["subject"], r["name"]) for r in figures.read(tmp_path / "gpu-figures.csv")}
    assert {("one", "error"), ("two", "rate"), ("two", "time")} <= rows


def test_kernels_are_listed_by_their_time(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SHAPES", (("clip", 64),))
    monkeypatch.setattr(kernels, "METHODS", ("dense", "siglip_kernel", "fastclip torch"))
    monkeypatch.setattr(kernels, "D", 16)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--without", "fastclip torch"]
    assert kernels.main(arguments) == 0
    rows = figures.read(tmp_path / "gpu-figures.csv")
    assert {row["subject"] for row in rows} == {"clip 64 dense"}, "what cannot run is left out"
    assert rows[0]["name"] == "total"
    values = [float(row["value"]) for row in rows[1:]]
    assert len(values) > 3 and values == sorted(values, reverse=True)
    assert sum(values) <= float(rows[0]["value"]) * 1.001
    assert any("aten::" in row["name"] for row in rows)


def test_counters_are_read_from_ncus_raw_page():
    (metrics,) = counters.parse(NCU)
    assert metrics["gpu__time_duration.sum"] == ["2,600.5", "us"]
    assert counters.chosen(metrics) == [
        ("time", 2600.5, "us"), ("registers a thread", 178.0, "register/thread"),
        ("bytes through L2", 1000.0, "byte"),
    ]  # fmt: skip
    stalls = {
        f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio": (value, "inst")
        for name, value in (("barrier", "0.5"), ("long_scoreboard", "2.5"), ("wait", "1"),
                            ("math_pipe_throttle", "1.5"), ("sleeping", "n/a"))
    }  # fmt: skip
    stalls["smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio"] = ("9", "")
    assert [name for name, _, _ in counters.chosen(stalls)] == [
        "stalled for long_scoreboard", "stalled for math_pipe_throttle", "stalled for wait",
    ]  # fmt: skip
    assert counters.parse("==ERROR== no permission\n") == []


def test_ncu_leaves_the_clocks_alone():
    line = counters.command("ncu", "sweep_kernel", Path("file"))
    assert line[line.index("--clock-control") + 1] == "none"
    assert line[line.index("--launch-count") + 1] == "1"
    assert line[-2:] == ["bench.gpu.counters", "--step"]


def test_a_kernel_that_cannot_be_profiled_is_reported(tmp_path, monkeypatch, capsys):
    def run(command, seconds, say, grace):
        pattern = command[command.index("--kernel-name") + 1]
        text = NCU if "sweep" in pattern else "==ERROR== ERR_NVGPUCTRPERM\n"
        Path(command[command.index("--log-file") + 1]).write_text(text)
        return counters.process.Ended(0, True, "")

    monkeypatch.setattr(counters.process, "run", run)
    monkeypatch.setattr(counters, "find", lambda: "ncu")
    assert counters.main(["--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAILED: weigh: ==ERROR== ERR_NVGPUCTRPERM" in out and "1 of 3 kernels" in out
    assert NCU in (tmp_path / "gpu-ncu.csv").read_text()
