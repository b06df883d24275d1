"""Tile candidates are timed in turns; winners replace the table's tiles."""

import sys

import pytest
import torch
from support.bench.rehearsal import Config, Configurations, tile_step
from support.triton_case import needs_triton

import fastclip
from bench.gpu import figures, tiles, winners
from fastclip.engine.block import Block, Side


@pytest.fixture
def configurations(monkeypatch: pytest.MonkeyPatch) -> Configurations:
    made = Configurations("configurations")
    monkeypatch.setitem(sys.modules, "fastclip.triton_kernels.configurations", made)
    monkeypatch.setattr(fastclip.triton_kernels, "configurations", made, raising=False)
    monkeypatch.setattr(tiles, "step", tile_step)
    monkeypatch.setattr(tiles, "compile_all", lambda device, seconds: None)
    return made


def test_candidates_take_turns_and_each_is_a_row(tmp_path, configurations, monkeypatch):
    turns = []
    monkeypatch.setitem(tiles.CLOCKS, "cpu", lambda run, repeats: turns.append(run) or 0.002)
    assert tiles.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert len(turns) == 2 * 2 * tiles.ROUNDS, "two kernels, two candidates that run"
    rows = figures.read(tmp_path / tiles.FILE)
    assert [(row["kernel"], row["default"], row["rounds"]) for row in rows[:3]] == [
        ("sweep", "1", "7"), ("sweep", "0", "0"), ("sweep", "0", "7"),
    ]  # fmt: skip
    assert rows[0]["ms"] == "2" and rows[1]["ms"] == ""
    assert rows[1]["note"] == "RuntimeError: out of resource: shared memory"
    # A row has the fields of the configuration, whatever they are.
    assert rows[2]["descriptors"] == "True" and rows[2]["config"] == "(128, 3, True)"
    assert configurations.choose.__qualname__ == Configurations.choose.__qualname__, "put back"


def test_tiles_written_so_far_survive_a_cut(tmp_path, configurations, monkeypatch):
    def clock(run, repeats):
        rounds = {row["rounds"] for row in figures.read(tmp_path / tiles.FILE)}
        if rounds == {"0", "2"}:
            raise KeyboardInterrupt
        return 0.002

    monkeypatch.setitem(tiles.CLOCKS, "cpu", clock)
    with pytest.raises(KeyboardInterrupt):
        tiles.main(["--device", "cpu", "--out", str(tmp_path)])
    rows = figures.read(tmp_path / tiles.FILE)
    assert [row["ms"] for row in rows] == ["2", "", "2"]


def test_a_candidate_that_ends_its_process_is_not_tried_again(
    tmp_path, configurations, monkeypatch
):
    """Its row is written before it runs."""

    def step(loss, n, d, device, keeps=False):
        def run(config: Config) -> None:
            if config.descriptors:
                raise SystemExit("a crash")

        configurations.choose(device, "torch.bfloat16", False, d, 8, "sweep", run)

    monkeypatch.setattr(tiles, "step", step)
    options = ["--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="a crash"):
        tiles.main(options)
    assert figures.read(tmp_path / tiles.FILE)[2]["note"] == tiles.DID_NOT_RETURN
    monkeypatch.setenv("FASTCLIP_BENCH_RUN", "1")
    assert tiles.main(options) == 0
    rows = figures.read(tmp_path / tiles.FILE)
    assert rows[0]["ms"] and rows[2]["note"].startswith(tiles.DID_NOT_RETURN)
    # A new run begins afresh.
    monkeypatch.setenv("FASTCLIP_BENCH_RUN", "0")
    with pytest.raises(SystemExit, match="a crash"):
        tiles.main(options)


def test_shares_of_candidates_are_compiled_apart(configurations, monkeypatch):
    ran = []

    def step(loss, n, d, device, keeps=False):
        name = f"{loss}{' kept' if keeps else ''}"
        configurations.choose(device, "bf16", False, d, 8, name, lambda c: ran.append((name, c)))

    monkeypatch.setattr(tiles, "step", step)
    for index in range(2):
        tiles.compile_share(index, 2, "cpu")
    found = configurations.candidates(Config(128, 3, False), "sweep")
    names = ("clip", "siglip", "clip kept")
    assert sorted(ran) == sorted((name, c) for name in names for c in found)


def test_winners_replace_the_table_for_the_kernels_they_were_timed_on(tmp_path, configurations):
    path = tmp_path / tiles.FILE
    columns = [*tiles.KEY, "default", "ms", "note", "config"]
    for kernel, own, other in (
        ("sweep", "2.0", "1.5"),
        ("weigh", "2.0", "1.99"),
        ("both", "", "3"),
    ):
        key = dict(zip(tiles.KEY, ("torch.bfloat16", "False", "768", "8", kernel), strict=True))
        for default, ms, config in ((1, own, "(128, 3, False)"), (0, other, "(128, 4, True)")):
            figures.append(path, {**key, "default": default, "ms": ms, "config": config}, columns)
    told = {winner.key[-1]: str(winner) for winner in winners.winners(path)}
    assert told["sweep"].endswith("(128, 4, True), 1.500 ms instead of 2.000 (-25 %)")
    assert "stays" in told["weigh"], "half a percent is noise"
    assert "does not run" in told["both"]
    better = winners.better_of(path)
    arguments = ("cuda:0", torch.bfloat16, False, 768, 8)
    with winners.applied(better):
        assert configurations.choose(*arguments, "sweep", None) == Config(128, 4, True)
        assert configurations.choose(*arguments, "weigh") == Config(128, 3, False)
        other = ("cuda:0", torch.float16, False, 768, 8, "sweep")
        assert configurations.choose(*other) == Config(128, 3, False)
    assert configurations.choose(*arguments, "sweep") == Config(128, 3, False)


@needs_triton
def test_the_triton_engine_asks_as_the_hook_expects():
    """`choosing` replaces `configurations.choose`: the engine must ask through the module, with the
    arguments in this order, and a configuration must be a named tuple that starts with tiles."""
    from fastclip.triton_kernels import configurations, logit_block

    assert issubclass(configurations.Config, tuple) and configurations.Config._fields[:2] == (
        "bm", "bn",
    )  # fmt: skip
    x = torch.zeros(32, 16)
    asked = []

    def hook(own, arguments):
        asked.append(arguments)
        return own(*arguments)

    with tiles.choosing(hook):
        made = logit_block.LogitBlock(Block(Side(x), Side(x), torch.ones(())))
        made.config("sweep", print)
    key = tiles.key_of(asked[0])
    assert key[0] == "torch.float32" and key[-1] == "sweep, softmax"
    assert tiles.run_of(asked[0]) is print
