"""The benchmark's clocks and memory measurements are right; no test asserts on real durations."""

import pytest
import torch
from support.bench import importing  # noqa: F401 -- makes `bench` importable

from bench.cases import Case
from bench.measure import memory, timing


class FakeClock:
    """A clock that only the runs advance, each by the next of its given seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def run(self, name: str, seconds: list[float]):
        left = iter(seconds)

        def step() -> None:
            self.calls.append(name)
            self.now += next(left)

        return step


def test_methods_take_turns_and_the_median_is_of_their_rounds(monkeypatch):
    clock = FakeClock(monkeypatch)
    # The first run of each only decides how often runs are repeated.
    runs = {
        "a": clock.run("a", [1.0, 1.0, 9.0, 2.0, 3.0, 4.0] * 9),
        "b": clock.run("b", [0.5] * 54),
        "c": clock.run("c", [0.25] * 54),
    }
    between = []
    found = timing.interleaved(runs, seconds=1.0, between=lambda: between.append(len(clock.calls)))
    assert clock.calls[3:12] == list("abc") + list("bca") + list("cab")
    assert len(clock.calls) == 12  # three rounds, though they took longer than asked for
    assert between == [3, 6, 9]
    assert (found["a"].median, found["a"].rounds) == (2.0, 3)
    assert (found["a"].low, found["a"].high) == (1.5, 5.5)
    assert found["b"].median == found["b"].low == 0.5


def test_short_runs_are_repeated_and_long_ones_run_once(monkeypatch):
    clock = FakeClock(monkeypatch)
    short = timing.interleaved({"a": clock.run("a", [1e-4] * 10_000)}, seconds=0.01)["a"]
    assert short.median == pytest.approx(1e-4)
    assert len(clock.calls) == 1 + 20 * short.rounds
    long = timing.interleaved({"b": clock.run("b", [100.0] * 9)}, seconds=1.0)["b"]
    assert (long.rounds, long.median) == (1, pytest.approx(100.0)) and long.low == long.high


@pytest.mark.parametrize("half", [False, True])
def test_the_limit_is_a_rate_and_is_forgotten_once_taken(half):
    limit = timing.GemmLimit(half)
    limit.sample()
    assert limit.source in ("brgemm", "torch.mm")
    assert limit.take() > 0
    assert limit.samples == []


# ---- memory


def test_a_known_allocation_shows_in_the_peak_even_after_it_is_freed():
    def touch(mebibytes: int) -> None:
        torch.ones(mebibytes * 2**18).sum()

    touch(1)
    large, small = memory.peak_bytes(lambda: touch(64)), memory.peak_bytes(lambda: touch(1))
    if large is None:
        pytest.skip("this machine does not tell the peak of a process")
    assert 60 <= large / 2**20 < 96
    assert small / 2**20 < 24


@pytest.mark.parametrize("mark, peak", [(200, 100), (151, 51), (150, None)])
def test_a_peak_is_the_mark_above_the_level(mark, peak, monkeypatch):
    """If a higher mark could not be reset and still stands, it hides the peak."""
    told = {"VmRSS": iter([100]), "VmHWM": iter([150, mark])}
    monkeypatch.setattr(memory, "_status", lambda key: next(told[key]) * 2**20)
    found = memory.peak_bytes(lambda: None)
    assert found == (None if peak is None else peak * 2**20)


def test_a_case_is_measured_in_a_process_of_its_own():
    case = Case("clip", 2048, 2048, 16, "float32", 14.3)
    peak, note = memory.measure(case, "dense")
    if note == "memory: cannot be measured on this machine":
        pytest.skip(note)
    assert note == ""
    assert 2 * 16 <= peak / 2**20 < 20 * 16  # the logits and their gradient, 16 MiB each, at least
    peak, note = memory.measure(case, "no such method")
    assert peak is None and "no such method" in note
