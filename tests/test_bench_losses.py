"""A loss is an entry in the benchmark's registry: every list is derived, no loss passes for another."""

from dataclasses import replace

import pytest
import torch
from bench_import import TINY, rows_of_a_case

from bench import baselines, cases, on_contrast, table
from bench.distributed import cases as across
from bench.distributed import methods
from bench.distributed import table as across_table
from bench.gpu import cases as gpu_cases
from bench.gpu import smoke, tiles
from bench.losses import LOSSES, loss_of
from fastclip import distributed, kinds, loss, reference

ASKED = {
    "losses": lambda name: loss_of(name),
    "inputs": lambda name: cases.make_inputs(replace(TINY, loss=name)),
    "dense": lambda name: baselines.METHODS["dense"].make(replace(TINY, loss=name), "cpu"),
    "fastclip": lambda name: baselines.METHODS["fastclip torch"].make(
        replace(TINY, loss=name), "cpu"
    ),
    "contrast": lambda name: on_contrast.make(
        replace(TINY, loss=name), cases.CONTRAST[0], "cpu", None
    ),
    "passes": lambda name: baselines.METHODS["fastclip"].passes(replace(TINY, loss=name), "cpu"),
    "table": lambda name: table.report(rows_of_a_case(loss=name)),
    "across": lambda name: methods.make(name, "fastclip", 0, 1),
    "smoke": lambda name: list(smoke.checks(name, "bfloat16", "cpu")),
    "tiles": lambda name: tiles.step(name, 8, 8, "cpu"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_an_unknown_loss_is_an_error_that_names_the_known_ones(asked):
    with pytest.raises(ValueError, match="loss must be one of 'clip', 'siglip', got 'siglit'"):
        ASKED[asked]("siglit")


def test_a_third_loss_joins_every_list_and_passes_for_no_other(monkeypatch):
    def third(*arguments: object) -> torch.Tensor:
        return torch.zeros(())

    entry = LOSSES["clip"]._replace(label="Third", dense=third, checkpointed=third, bias=-3.0)
    monkeypatch.setitem(LOSSES, "third", entry)
    case = replace(TINY, loss="third")
    assert cases.make_inputs(case).bias == -3.0
    for method in ("dense", "checkpoint"):
        assert baselines.METHODS[method].make(case, "cpu") is third
    plans = [cases.standard(), cases.full(), cases.quick(), across.standard(), across.quick()]
    plans += [gpu_cases.headline(), gpu_cases.small(), gpu_cases.rest()]
    assert all({case.loss for case in plan} == set(LOSSES) for plan in plans)
    assert {name for _, name, _ in smoke.jobs(["torch"])} == set(LOSSES)
    assert "## Third, N = 8192" in table.report(rows_of_a_case(loss="third"))
    assert across_table._name("third", "open_clip") == "open_clip, local loss"


def test_the_registry_agrees_with_the_library():
    for entry in LOSSES.values():
        assert entry.in_one_go == kinds.kind_of(entry.kind).is_linear
        for name, module in (
            ("loss", loss),
            ("reference", reference),
            ("distributed", distributed),
        ):
            assert entry.of_fastclip(name) is getattr(module, entry.function)
        assert next(iter(entry.rivals)) == "open_clip"
