"""The family's rows: truths, passes, plan, measurements and tables follow from a row alone."""

from dataclasses import replace

import pytest
import torch
from support.bench.importing import TINY, relative, rows_of_a_case
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as command
from bench import cases
from bench.cases import Case
from bench.losses import FAMILY, LOSSES, loss_of
from bench.measure import memory, runner, truth
from bench.methods import passes, registry
from bench.methods.step import make_step
from bench.report import family, goals, results, summary, table
from fastclip.engine import checks

# Several blocks of the truth, the last one short.
N = 37


def case_of(loss: str, n: int = N, **changes: object) -> Case:
    return replace(TINY, loss=loss, m=n, n=n, **changes)


def in_float64(inputs: cases.Inputs) -> cases.Inputs:
    slots = [None if t is None else t.detach().double().requires_grad_() for t in inputs.slots]
    further = [t.double() if t.is_floating_point() else t for t in inputs.further]
    return cases.Inputs(*slots, tuple(further))


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "BLOCK_ROWS", 8)


@pytest.mark.parametrize("loss", FAMILY)
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_truth_is_the_float64_reference(loss, scale):
    known, inputs = loss_of(loss), in_float64(cases.make_inputs(case_of(loss, scale=scale)))
    value = known.call(known.of_fastclip("reference"), inputs)
    expected = (value, *torch.autograd.grad(value, inputs.leaves))
    found = known.call(known.truth, inputs)
    got = [t for t in (found.loss, found.dx, found.dy, found.dscale) if t is not None]
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert relative(one, other) < 1e-12


METHODS = ("open_clip", "dense", "reference", "fastclip", "fastclip torch")


@pytest.mark.parametrize("loss", FAMILY)
def test_every_method_computes_the_same_loss_and_gradients(loss):
    known, inputs = loss_of(loss), cases.make_inputs(case_of(loss))
    true = known.call(known.truth, inputs)
    done = []
    for method in (*METHODS, *known.peers):
        case = case_of(loss, methods=(method,))
        try:
            step = make_step(case, method, inputs)
        except (registry.Unavailable, ImportError):
            continue
        got, peer = step(), known.peers.get(method)
        assert [t is None for t in got[1:]] == [t is None for t in inputs.slots] or peer
        pairs = list(zip(got, (true.loss, true.dx, true.dy, true.dscale), strict=False))
        for value, expected in pairs[:1] if peer and peer.normalises else pairs:
            if value is not None:
                assert truth.relative_error(value, expected) < 2e-5, method
        (forward,) = make_step(replace(case, mode="forward"), method, inputs)()
        assert truth.relative_error(forward, true.loss) < 2e-5 and not forward.requires_grad
        done.append(method)
    assert {"dense", "reference", "fastclip torch"} <= set(done)
    assert ("open_clip" in done) <= (known.module is not None)


@pytest.mark.parametrize("loss", FAMILY)
@pytest.mark.parametrize("mode", ["both", "forward"])
@pytest.mark.parametrize("method", ["dense", "fastclip", "fastclip budget=0", "fastclip torch"])
@pytest.mark.parametrize("kept_rows", [32, 13])
def test_passes_are_those_that_a_counter_finds(loss, method, mode, kept_rows, monkeypatch):
    """Also if the budget does not hold all products."""
    monkeypatch.setitem(checks.DEFAULT_BUDGETS, "cpu", kept_rows * 32 * 4)
    case = case_of(loss, n=32, mode=mode)
    if method in ("fastclip", "fastclip budget=0"):
        pytest.importorskip("fastclip._C")
    step = make_step(case, method, cases.make_inputs(case))
    with FlopCounterMode(display=False) as counter:
        step()
    found = counter.get_total_flops() / case.pass_flops
    assert found == pytest.approx(registry.METHODS[method].passes(case, "cpu"))


def test_inputs_are_those_that_the_loss_has():
    for name, known in FAMILY.items():
        inputs, again = (cases.make_inputs(case_of(name)) for _ in range(2))
        assert (inputs.y is None) == known.one_side and (inputs.scale is None) != known.scaled
        assert torch.equal(inputs.x, cases.make_inputs(case_of("clip")).x)
        assert not any(t.requires_grad for t in inputs.further)
        for one, other in zip(inputs.further, again.further, strict=True):
            assert torch.equal(one, other)
        rows = N if known.one_side else 2 * N
        assert passes.gradient_bytes(case_of(name)) == 4 * rows * TINY.d
    (labels,) = cases.make_inputs(case_of("supcon")).further
    assert (labels[:, None] == labels).sum(1).float().mean() > 4
    teacher_x, _, teacher_scale = cases.make_inputs(case_of("distill")).further
    assert teacher_x.shape == (N, TINY.d) and teacher_scale == 100


def test_a_row_joins_the_plan_the_tables_and_the_goals(monkeypatch, tmp_path):
    entry = FAMILY["info_nce"]._replace(label="Third", module="ThirdLoss", floor=7.0)
    monkeypatch.setitem(FAMILY, "third", entry)
    plan = [case for case in cases.family() if case.loss == "third"]
    assert [case.n for case in plan] == [256, 2048, 8192, 65536]
    assert all(case.memory and "fastclip" in case.methods for case in plan)
    assert {"open_clip", "dense", "compiled", *entry.peers} <= set(plan[0].methods)
    assert plan[-1].methods == ("fastclip",) and not plan[-1].timed
    for other in (cases.standard(), cases.full(), cases.quick()):
        assert {case.loss for case in other} == set(LOSSES)
    rows = [replace(row, loss="third", over_dense=3.2) for row in rows_of_a_case()[:3]]
    assert "## Third, N = 8192" in table.report(rows)
    text = "\n".join(family.essentials(rows_of_a_case() + rows))
    assert len([line for line in text.splitlines() if line.startswith("| Third ")]) == 3
    found = {one.goal.text: one for one in goals.judged(rows, goals.family_goals())}
    assert found["Third, N = 8192: faster than the dense loss"].verdict == "missed"
    assert "7.00x" in goals.table_of_family(rows)


def test_the_family_leaves_the_tables_of_other_losses_as_they_are(tmp_path):
    rows = rows_of_a_case()
    later = [
        replace(row, loss="supcon", when="2031-01-02 03:04", rest_mib=999.0) for row in rows[:3]
    ]
    whole, alone = (table.essentials(found, tmp_path / "a.csv") for found in (rows + later, rows))
    assert whole == alone
    own = "\n".join(family.essentials(rows + later))
    assert "2031" in own and "999" in own and family.essentials(rows) == []
    path, readme = tmp_path / "test.csv", tmp_path / "README.md"
    texts = []
    for found in (rows + later, rows):
        results.write(path, found)
        readme.write_text(f"{summary.BEGIN}{summary.END}")
        summary.into_readme(readme, [path])
        texts.append(readme.read_text())
    assert texts[0] == texts[1]
    assert goals.table_of(rows + later) == goals.table_of(rows)
    assert goals.table_of_family(rows) == ""


def test_a_case_that_is_not_timed_has_only_its_memory(monkeypatch, tmp_path):
    measured = []

    def measure(case: Case, method: str, device: str) -> tuple[int, str]:
        measured.append((case.loss, method))
        return 2**20 * 10, ""

    monkeypatch.setattr(memory, "measure", measure)
    methods = ("dense", "lightly", "fastclip torch")
    case = case_of("supcon", n=512, methods=methods, memory=True, timed=False)
    options = runner.Options(tmp_path / "test.csv")
    *rows, skipped = runner.run([case], options)
    assert measured == [("supcon", "dense"), ("supcon", "fastclip torch")]
    assert all(row.ms is None and row.err_dx is None and row.peak_mib == 10 for row in rows)
    assert rows[0].gradients_mib == 512 * TINY.d * 4 / 2**20 and rows[0].passes == 3
    assert (skipped.method, skipped.mode) == ("lightly", "skipped")


def test_peers_say_why_they_cannot_run():
    for method, loss, reason in (
        ("lightly", "supcon", "has no supcon loss|is not installed"),
        ("metric_learning", "nt_xent", "too much memory beyond N = 256|is not installed"),
        ("open_clip", "ranking", "has no ranking loss"),
        ("checkpoint", "ranking", "no checkpointed form"),
        ("fastclip contrast", "ranking", "itself written on `contrast`"),
    ):
        with pytest.raises(registry.Unavailable, match=reason):
            registry.METHODS[method].make(case_of(loss, n=512), "cpu")


def test_the_command_line_lists_the_family(capsys):
    assert command.main(["--list", "--family", "--only", "* 2048*"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[: len(FAMILY)]] == list(FAMILY)
