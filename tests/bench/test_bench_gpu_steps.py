"""`make gpu` rehearsed without a card: the order of its steps, what a cut leaves, the verdict."""

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.bench.importing import rows_of_a_case
from support.bench.rehearsal import Rehearsal
from support.triton_case import needs_triton

from bench.gpu import __main__ as command
from bench.gpu import figures, install, plan, process, report, rows, smoke, steps, suite, tiles
from bench.report import results

FIRST = ["install", "rates", "smoke", "tiles", "headline", "kernels", "ncu", "contrast", "engines",
         "small", "card tests", "rest", "loss tests"]  # fmt: skip
AGAIN = ["install", "winners", "smoke", "headline", "card tests", "loss tests", "sanitizers"]


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rehearsal]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a hundred tiny products: with more they wait for one another
    yield Rehearsal(monkeypatch)
    torch.set_num_threads(threads)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    """A rehearsal of the same steps in which their code does not run."""
    return Rehearsal(monkeypatch, real=False)


def statuses(path: Path) -> dict[str, str]:
    return {row["step"]: row["status"] for row in figures.read(path)}


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line]


@needs_triton
def test_a_first_run_step_by_step(tmp_path, rehearsal):
    """The results of each step are on disk before the next one begins."""
    session = rehearsal.session(tmp_path)
    files = {
        "rates": "gpu-figures.csv", "smoke": "gpu-smoke.csv", "tiles": "gpu-tiles.csv",
        "headline": rows.path_of(tmp_path, "cpu").name, "ncu": "gpu-ncu.csv",
    }  # fmt: skip
    found = {}

    def look(name: str) -> None:
        now = statuses(tmp_path / "gpu-steps.csv")
        lengths = {
            step: len(lines_of(tmp_path / file)) if (tmp_path / file).exists() else 0
            for step, file in files.items()
        }
        found.setdefault(list(now)[-1], (now, lengths))

    rehearsal.look = look
    assert command.run(plan.first(), session) == 0, session.outcomes
    assert list(found) == FIRST
    for place, (now, lengths) in enumerate(found.values()):
        assert now == {**dict.fromkeys(FIRST[:place], "passed"), FIRST[place]: "running"}
        written = [step for step in files if lengths[step] > 1]
        assert written == [step for step in files if step in FIRST[:place]]
    assert statuses(tmp_path / "gpu-steps.csv") == dict.fromkeys(FIRST, "passed")

    log = lines_of(tmp_path / "gpu-log.txt")
    assert log[-1].startswith(f"verdict: {len(FIRST)} of {len(FIRST)} steps passed; goals: ")
    assert sum(line.startswith("=== ") for line in log) == len(FIRST) + 1
    page = report.report(session)
    assert len(page) < 8000, "the end of the output must show the whole page"
    for told in ("| headline", "| engines", "sweep, bfloat16, D = 768: (128, 3, False) "):
        assert told in page
    assert "not measured: siglip_kernel (needs a CUDA device" in page
    assert len(list(tmp_path.iterdir())) == 7, "few files: some machines hand back eight"

    found = figures.read(tmp_path / "gpu-figures.csv")
    assert {row["step"] for row in found} == {"rates", "kernels", "ncu"}
    assert any(row["subject"] == "sweep" and row["value"] == "2600.5" for row in found)
    checked = figures.read(tmp_path / "gpu-smoke.csv")
    assert {row["status"] for row in checked} == {"passed"} and len(checked) > 20


@needs_triton
def test_a_second_run_tries_the_winners_and_leaves_the_first_runs_files(tmp_path, rehearsal):
    first = {"sweep": ("1.25", "1.0"), "both": ("2.0", "2.5")}
    columns = [*tiles.KEY, "default", "ms", "note", "config"]
    for kernel, (own, other) in first.items():
        key = dict(zip(tiles.KEY, ("torch.bfloat16", "False", "768", "8", kernel), strict=True))
        for default, ms, config in ((1, own, "(128, 3, False)"), (0, other, "(128, 3, True)")):
            row = {**key, "default": default, "ms": ms, "config": config}
            figures.append(tmp_path / tiles.FILE, row, columns)
    passed = {"step": "card tests", "status": "passed"}
    figures.append(tmp_path / "gpu-steps.csv", passed, steps.COLUMNS)
    before = (tmp_path / tiles.FILE).read_text()
    rehearsal.patch.setattr(
        "bench.methods.registry.METHODS",
        {**importlib.import_module("bench.methods.registry").METHODS},
    )
    session = rehearsal.session(tmp_path, 240.0, again=True)
    command.run(plan.again(), session)
    now = statuses(tmp_path / "gpu-again-steps.csv")
    assert list(now) == AGAIN
    # The Triton engine cannot run here: its rows say so, and the run continues.
    assert now["card tests"] == "not run", "the first run's passed"
    assert now["winners"] == now["loss tests"] == now["sanitizers"] == "passed"
    log = "\n".join(lines_of(tmp_path / "gpu-again-log.txt"))
    told = "(128, 3, False) -> (128, 3, True), 1.000 ms instead of 1.250 (-20 %)"
    assert f"sweep, bfloat16, D = 768: {told}" in log
    assert "both, bfloat16, D = 768: (128, 3, False) stays, 2.000 ms" in log
    assert "1 of 2 entries of the table should change" in log
    assert (tmp_path / tiles.FILE).read_text() == before
    assert {path.name for path in tmp_path.iterdir()} >= {"gpu-again-smoke.csv", "gpu-tiles.csv"}


def test_chosen_steps_run_in_the_order_given(tmp_path, order, monkeypatch):
    ran: list[str] = []
    monkeypatch.setattr(command, "run", lambda todo, session: ran.extend(s.name for s in todo) or 0)
    line = ["--device", "cpu", "--out", str(tmp_path), "--only"]
    assert command.main([*line, "card tests", "rates"]) == 0 and ran == ["card tests", "rates"]
    assert command.main([*line, "rates", "none"]) == 2 and len(ran) == 2


def test_without_a_first_run_there_are_no_winners(tmp_path, order, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "none")
    session = order.session(tmp_path, 240.0, again=True)
    command.run(plan.again(), session)
    notes = {o.step: o.note for o in session.outcomes if o.status == "not run"}
    assert set(notes) == {"winners", "smoke", "headline"} and "WINNERS=path" in notes["smoke"]


@pytest.mark.parametrize("failing", ["pip", "smoke", "headline", "card"])
def test_a_failing_step_is_reported_and_does_not_stop_the_rest(failing, tmp_path, order):
    order.codes[failing] = 3
    session = order.session(tmp_path)
    assert command.run(plan.first(), session) == 1
    now = statuses(tmp_path / "gpu-steps.csv")
    step = {"pip": "install", "card": "card tests"}.get(failing, failing)
    assert [name for name, status in now.items() if status == "FAILED"] == [step]
    assert list(now) == FIRST
    log = lines_of(tmp_path / "gpu-log.txt")
    assert f"FAILED: {step}" in log[-1] and log[-1].startswith("verdict: 12 of 13 steps passed")
    assert any(line.startswith(f"{step}: FAILED") for line in log[-5:]), (
        "the reason stands close by"
    )


def test_an_error_of_a_steps_own_does_not_stop_the_rest(tmp_path, order):
    def fail(session: steps.Session, seconds: float) -> steps.Outcome:
        raise ZeroDivisionError("of our own")

    session = order.session(tmp_path)
    steps.run_all(
        [steps.Step("one", 50, fail), steps.Step("install", 50, install.install)], session
    )
    assert [o.status for o in session.outcomes] == ["FAILED", "passed"]
    assert session.outcomes[0].note == "ZeroDivisionError: of our own"


@pytest.mark.parametrize("cut", ["rates", "headline", "losses"])
def test_a_run_that_is_told_to_stop_still_reports(cut, tmp_path, order):
    """The run gets Ctrl-C or SIGTERM at any step; `__main__.run` turns SIGTERM into Ctrl-C."""

    def look(name: str) -> None:
        if name == cut:
            signal.raise_signal(signal.SIGTERM)

    order.look = look
    before = signal.getsignal(signal.SIGTERM)
    session = order.session(tmp_path)
    assert command.run(plan.first(), session) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    now = statuses(tmp_path / "gpu-steps.csv")
    step = {"losses": "loss tests"}.get(cut, cut)
    assert list(now)[-1] == step and now[step] == "cut"
    passed = FIRST.index(step)
    log = lines_of(tmp_path / "gpu-log.txt")
    assert "interrupted" in log
    assert log[-1].startswith(f"verdict: {passed} of {passed + 1} steps passed; cut: {step}")


def test_steps_that_do_not_fit_in_the_time_are_left_out_and_named(tmp_path, order):
    order.seconds = {"headline": 100, "tiles": 45}
    session = order.session(tmp_path, seconds=150.0)
    command.run(plan.first(), session)
    now = statuses(tmp_path / "gpu-steps.csv")
    assert now["tiles"] == "passed" and now["headline"] == "FAILED", "cut, and that is a failure"
    left_out = [name for name, status in now.items() if status == "not run"]
    assert left_out == FIRST[FIRST.index("headline") + 1 :]
    assert order.now <= 1000 + 150 - steps.RESERVE + 1e-6, "there is time to kill, and to report"
    assert "not run: kernels, ncu," in lines_of(tmp_path / "gpu-log.txt")[-1]


def test_loss_tests_that_are_cut_are_not_a_failure(tmp_path, order):
    order.seconds = {"losses": 1000}
    session = order.session(tmp_path)
    assert command.run(plan.first(), session) == 0
    assert statuses(tmp_path / "gpu-steps.csv")["loss tests"] == "cut"


def test_a_process_that_loses_its_device_is_started_again(tmp_path, order):
    codes = iter([steps.LOST_STATUS, steps.LOST_STATUS, 0])
    numbers = []

    def run(command, seconds, say, environment):
        order.now += 10
        numbers.append((environment["FASTCLIP_BENCH_RUN"], environment["FASTCLIP_BENCH_SECONDS"]))
        return process.Ended(next(codes), True, "last")

    order.patch.setattr(process, "run", run)
    session = order.session(tmp_path)
    outcome = steps.commanded("rows", lambda session: ["python"])(session, 100.0)
    assert outcome.status == "passed" and outcome.seconds == 30
    assert numbers == [("0", "100"), ("1", "90"), ("2", "80")]


def test_engines_that_crash_in_the_smoke_test_are_left_out_of_the_headline(tmp_path, order):
    session = order.session(tmp_path)
    assert plan.without(session) == [] and plan.no_triton(session) in (
        None, "Triton is not installed",
    )  # fmt: skip
    row = {"engine": "triton", "loss": "clip", "check": "process", "status": "FAILED"}
    figures.append(tmp_path / smoke.FILE, {**row, "dtype": "float32"}, smoke.COLUMNS)
    assert plan.without(session) == [], "the headline is in bf16"
    figures.append(tmp_path / smoke.FILE, {**row, "dtype": "bfloat16"}, smoke.COLUMNS)
    assert {"fastclip", "fastclip triton", "fastclip triton kept"} <= set(plan.without(session))
    assert "fastclip cuda" not in plan.without(session)
    assert plan.no_triton(session) is not None
    line = plan.rows("headline")(session)
    assert line[line.index("--without") + 1 :] == plan.without(session)


def test_card_tests_that_the_first_run_did_not_finish_are_run_again(tmp_path, order):
    row = {"step": "card tests", "status": "FAILED", "note": "not done in 60 s"}
    figures.append(tmp_path / "gpu-steps.csv", row, steps.COLUMNS)
    order.seconds = {"card": 70}
    command.run(plan.again(), order.session(tmp_path, 240.0, again=True))
    assert statuses(tmp_path / "gpu-again-steps.csv")["card tests"] == "passed"


def test_a_second_run_starts_with_the_last_files_of_tests(tmp_path, order):
    commands = []
    run = process.run
    order.patch.setattr(process, "run", lambda c, *more: commands.append(c) or run(c, *more))
    command.run(plan.again(), order.session(tmp_path, 240.0, again=True))
    files = suite.GROUPS["losses"]
    assert suite.command("losses")[-len(files) :] == list(files)
    assert any(tuple(line[-len(files) :]) == files[::-1] for line in commands)


def test_the_limits_leave_time_for_the_tests():
    first = {step.name: step.seconds for step in plan.first()}
    assert list(first) == FIRST and [step.name for step in plan.again()] == AGAIN
    before = sum(first[name] for name in FIRST[1 : FIRST.index("card tests")])
    # From a bundle fastclip is installed in twenty seconds.
    assert 20 + before + 60 <= plan.FIRST_SECONDS - steps.RESERVE
    assert (plan.FIRST_SECONDS, plan.AGAIN_SECONDS) == (480, 240)


def test_without_a_device_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ([], ["--check"]):
        assert command.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and "finds no CUDA device" in captured.err
        assert captured.out == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.main(["--check"]) == 0
    assert command.main(["--bundle", "/no/such/folder"]) == 2
    assert "BUNDLE must be a folder, got /no/such/folder" in capsys.readouterr().err


def test_files_go_to_out(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sessions = []
    monkeypatch.setattr(command, "run", lambda todo, session: sessions.append(session) or 0)
    assert command.main([]) == 0 and command.main(["--again", "--seconds", "99"]) == 0
    first, again = sessions
    assert first.out == again.out == tmp_path / "out"
    assert first.left == pytest.approx(480, abs=5) and again.left == pytest.approx(99, abs=5)
    assert first.file("steps.csv") != again.file("steps.csv")


def test_rows_of_an_earlier_run_are_not_reported(tmp_path, order):
    path = rows.path_of(tmp_path, "cpu")
    results.write(path, rows_of_a_case(when="2020-01-01 00:00"))
    session = order.session(tmp_path)
    page = report.report(session)
    assert "open_clip" not in page and "goals" not in page.splitlines()[-1]
    earlier = rows_of_a_case(when="2020-01-01 00:00", threads=0, capability="sm_90",
                             dtype="bfloat16", m=32768, n=32768, d=768)  # fmt: skip
    now = rows_of_a_case(when="2999-01-01 00:00", threads=0, capability="sm_90",
                         dtype="float32", m=16384, n=16384, d=768, over_dense=2.0)  # fmt: skip
    path.unlink()
    results.write(path, [*earlier, *now])
    assert "goals: 0 aim, 1 floor, 0 missed" in report.verdict(session)
