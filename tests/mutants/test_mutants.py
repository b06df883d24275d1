"""The list of mutants keeps up with the code, and the runner tells what became of each."""

import re
import shutil
from pathlib import Path

import pytest
from support.installation import ROOT

from mutants.__main__ import chosen, row, run, status, summary
from mutants.lists import AREAS, Area
from mutants.mutant import DoesNotApply, Mutant, mutant
from mutants.trial import Verdict, trial

EVERY = [(area, one) for area, found in AREAS.items() for one in found.mutants]


def test_there_are_many_mutants_and_each_has_a_name() -> None:
    names = [f"{area}: {one.name}" for area, one in EVERY]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize("area", AREAS)
def test_every_mutant_applies(area: str) -> None:
    """Its line occurs once, and its tests exist."""
    for one in AREAS[area].mutants:
        assert one.applied((ROOT / one.path).read_text())
        assert one.tests, one.name
        for test in one.tests:
            file, _, function = test.partition("::")
            text = (ROOT / file).read_text()
            name = function.partition("[")[0]
            assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), test


# ---- the runner, on a project of one function ----------------------------------------------------

VALUE = "def double(x):\n    return x + x\n"
TESTS = "from value import double\n\n\ndef test_double():\n    assert double(3) == 6\n"


def broken(name: str, line: str, replacement: str, **options: bool) -> Mutant:
    return mutant(name, "value.py", line, replacement, "test_value.py", **options)


WRONG = broken("wrong", "x + x", "x * x")
EQUIVALENT = broken("equivalent", "x + x", "2 * x")
HANGS = broken("hangs", "return x + x", "while True: pass", hangs=True)
GONE = broken("gone", "x - x", "x")
UNREADABLE = broken("unreadable", "return x + x", "return (")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins take a second
    folder = tmp_path / "0"
    folder.mkdir()
    (folder / "value.py").write_text(VALUE)
    (folder / "test_value.py").write_text(TESTS)
    return folder


def test_verdicts(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A survivor is reported as such. Trees are as they were afterwards."""
    mutants = [WRONG, EQUIVALENT, HANGS, HANGS._replace(hangs=False), GONE, UNREADABLE]
    trees = [tree, *(tree.parent / str(k) for k in (1, 2, 3))]
    for other in trees[1:]:
        shutil.copytree(tree, other)
    # A busy machine takes longer than the limit of those that hang for a test of two lines.
    quick = [("area", one) for one in mutants if one.name != "hangs"]
    slow = [("area", one) for one in mutants if one.name == "hangs"]
    areas = {"area": Area(mutants)}
    entries, outcomes = quick + slow, run(quick, areas, trees) + run(slow, areas, trees, seconds=2)
    assert [outcome.verdict for outcome in outcomes] == [
        Verdict.KILLED, Verdict.SURVIVED, Verdict.DID_NOT_APPLY, Verdict.DID_NOT_RUN,
        Verdict.KILLED, Verdict.TIMED_OUT,
    ]  # fmt: skip
    assert outcomes[0].said == "test_value.py::test_double"
    assert [(one / "value.py").read_text() for one in trees] == [VALUE] * 4
    shown = capsys.readouterr().out.splitlines()
    assert row(entries[1], outcomes[1]) in shown
    told = summary(entries, outcomes).splitlines()
    counts = "6 mutants: 1 DID NOT APPLY, 1 DID NOT RUN, 1 SURVIVED, 1 TIMED OUT, 2 killed"
    assert told[0].split() == ["area", *counts.split()]
    assert told[1].startswith("SURVIVED") and "area: equivalent (value.py)" in told[1]
    assert (status(outcomes), status(outcomes[:1])) == (1, 0)


def test_a_mutant_must_change_one_place(tree: Path) -> None:
    for line, replacement in (("x", "y"), ("x + x", "x + x"), ("", "")):
        with pytest.raises(DoesNotApply):
            broken("none", line, replacement).applied(VALUE)
    missing = WRONG._replace(path="no_such_file.py")
    assert trial(missing, tree).verdict is Verdict.DID_NOT_APPLY


def test_mutants_are_chosen_by_area_and_name() -> None:
    areas = {"one": Area([WRONG, EQUIVALENT]), "two": Area([WRONG, HANGS])}
    assert len(chosen(areas, None, [])) == 4
    assert chosen(areas, "two", []) == [("two", WRONG), ("two", HANGS)]
    assert chosen(areas, None, ["*: wrong"]) == [("one", WRONG), ("two", WRONG)]
    assert chosen(areas, "one", ["one: eq*", "two: *"]) == [("one", EQUIVALENT)]
