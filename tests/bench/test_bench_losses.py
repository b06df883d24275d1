"""A loss of the benchmark is an entry in its registry; an unknown name is never another loss."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.bench.importing import ROOT, TINY, rows_of_a_case

from bench import cases
from bench.distributed import cases as across
from bench.distributed import methods
from bench.distributed import table as across_table
from bench.gpu import cases as gpu_cases
from bench.gpu import smoke, smoke_checks, tiles
from bench.losses import LOSSES, loss_of
from bench.methods import on_contrast, registry
from bench.report import table
from fastclip import distributed, kinds, loss, reference


def case_of(name: str) -> cases.Case:
    return replace(TINY, loss=name)


ASKED = {
    "losses": loss_of,
    "inputs": lambda name: cases.make_inputs(case_of(name)),
    "dense": lambda name: registry.METHODS["dense"].make(case_of(name), "cpu"),
    "fastclip": lambda name: registry.METHODS["fastclip torch"].make(case_of(name), "cpu"),
    "contrast": lambda name: on_contrast.make(case_of(name), cases.CONTRAST[0], "cpu", None),
    "passes": lambda name: registry.METHODS["fastclip"].passes(case_of(name), "cpu"),
    "table": lambda name: table.report(rows_of_a_case(loss=name)),
    "across": lambda name: methods.make(name, "fastclip", 0, 1),
    "smoke": lambda name: list(smoke_checks.checks(name, "bfloat16", "cpu")),
    "tiles": lambda name: tiles.step(name, 8, 8, "cpu"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_an_unknown_loss_is_an_error_that_names_the_known_ones(asked):
    with pytest.raises(ValueError, match=r"loss must be one of 'clip', 'siglip', .*, got 'siglit'"):
        ASKED[asked]("siglit")


def test_a_third_loss_joins_every_list_and_is_never_taken_for_another(monkeypatch):
    def third(*arguments: object) -> torch.Tensor:
        return torch.zeros(())

    entry = LOSSES["clip"]._replace(label="Third", dense=third, checkpointed=third, bias=-3.0)
    monkeypatch.setitem(LOSSES, "third", entry)
    case = replace(TINY, loss="third")
    assert cases.make_inputs(case).bias == -3.0
    for method in ("dense", "checkpoint"):
        assert registry.METHODS[method].make(case, "cpu") is third
    plans = [cases.standard(), cases.full(), cases.quick(), across.standard(), across.quick()]
    plans += [gpu_cases.headline(), gpu_cases.small(), gpu_cases.rest()]
    assert all({case.loss for case in plan} == set(LOSSES) for plan in plans)
    assert {name for _, name, _ in smoke.jobs(["torch"])} == set(LOSSES)
    assert "## Third, N = 8192" in table.report(rows_of_a_case(loss="third"))
    assert across_table._name("third", "open_clip") == "open_clip, local loss"


def test_the_registry_agrees_with_the_library():
    for entry in LOSSES.values():
        assert entry.in_one_go == kinds.kind_of(entry.kind).is_linear
        for module in (loss, reference, distributed):
            name = module.__name__.removeprefix("fastclip.")
            assert entry.of_fastclip(name) is getattr(module, entry.function)
        assert next(iter(entry.rivals)) == "open_clip"


def test_ids_and_a_margin_are_passed_although_they_leave_no_pair_out(monkeypatch):
    asked = []

    def record(*arguments: object, **options: object) -> None:
        asked.append(options)
        raise StopIteration

    monkeypatch.setattr("fastclip.contrast", record)
    for method in cases.CONTRAST:
        with pytest.raises(StopIteration):
            on_contrast.make(case_of("siglip"), method, "cpu", "torch")(None, None, None, None)
    plain, with_ids, with_margin = asked
    assert plain == {"kind": "sigmoid", "backend": "torch"}
    ids_x, ids_y = with_ids.pop("ids")
    assert torch.equal(ids_x, ids_y) and ids_x.dtype == torch.int64
    assert sorted(ids_x.tolist()) == list(range(TINY.n)) and with_ids == plain
    assert with_margin.pop("false_negative_margin") == 2.0 and with_margin == plain


def test_the_steps_of_make_gpu_are_planned_before_fastclip_is_installed():
    line = "import sys; sys.modules['fastclip'] = None; from bench.gpu import plan; plan.first()"
    environment = {**os.environ, "PYTHONSAFEPATH": ""}
    subprocess.run([sys.executable, "-c", line], cwd=ROOT, env=environment, check=True, timeout=120)
