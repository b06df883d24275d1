"""The program that patches the hosts of a script, and replacements, without any host."""

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support.installation import ROOT

from fastclip import patch as program
from fastclip.integrations import HOSTS, on_import
from fastclip.integrations.replacements import Replacements

HOST = "host_of_the_test"
IMPORTS = f"import {HOST}; print({HOST}.loss)"


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[str, str]]:
    """Returns a function that runs the program with a script, and returns what it printed.

    The script can import a host, whose integration is `patch`.
    """
    (tmp_path / f"{HOST}.py").write_text("loss = 'theirs'")
    (tmp_path / "beside.py").write_text("value = 'beside the script'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(on_import, "_waiting", {})
    monkeypatch.setattr(program, "HOSTS", {HOST: "of_the_test", "another_host": ""})
    monkeypatch.delenv("RANK", raising=False)

    def replaces() -> None:
        sys.modules[HOST].loss = "ours"

    def call(script: str, *arguments: str, patch: Callable[[], None] = replaces) -> tuple[str, str]:
        (tmp_path / "script.py").write_text(textwrap.dedent(script))
        integration = ModuleType("fastclip.integrations.of_the_test")
        integration.patch = patch
        monkeypatch.setitem(sys.modules, integration.__name__, integration)
        for name in (HOST, "beside"):
            sys.modules.pop(name, None)
        program.main(arguments)
        return capsys.readouterr()

    return call


@pytest.mark.parametrize("target", ["script.py", "script"])
def test_a_script_is_patched_when_it_imports_the_host(
    target: str, run: Callable[..., tuple[str, str]]
) -> None:
    script = f"""
        import sys
        import beside
        from {HOST} import loss
        assert __name__ == "__main__"
        print(loss, beside.value, sys.argv[1:])
    """
    out, err = run(script, target, "--host", "other", "-x")
    assert out == "ours beside the script ['--host', 'other', '-x']\n"
    assert err == f"fastclip.patch: {HOST} computes its losses with fastclip\n"


def test_only_the_first_rank_says_so(
    run: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(IMPORTS, "script.py") == ("ours\n", "")


def test_hosts_can_be_chosen(run: Callable[..., tuple[str, str]]) -> None:
    out, err = run(IMPORTS, "--host", "another_host", "script.py")
    assert out == "theirs\n"
    assert "nothing was patched: script.py imported none of another_host" in err


@pytest.mark.parametrize("status", [0, 3])
def test_a_script_that_exits(
    status: int, run: Callable[..., tuple[str, str]], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(f"import sys; sys.exit({status})", "script.py")
    assert ended.value.code == status
    assert "nothing was patched: script.py imported none" in capsys.readouterr().err


def test_a_script_without_an_ending(
    run: Callable[..., tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "runner").write_text(
        f"import {HOST}, os\nprint(__file__ == os.path.abspath('runner'))"
    )
    assert run("", "runner")[0] == "True\n"


def test_a_wrong_switch(
    run: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCLIP_DISABLE", "yes")
    with pytest.raises(SystemExit, match=r"fastclip\.patch: FASTCLIP_DISABLE must be 0 or 1"):
        run(IMPORTS, "script.py")


def test_the_switch_leaves_hosts_alone(
    run: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCLIP_DISABLE", "1")
    out, err = run(IMPORTS, "script.py")
    assert out == "theirs\n" and "FASTCLIP_DISABLE=1, so nothing is patched" in err


def test_a_refused_host_ends_the_script(run: Callable[..., tuple[str, str]]) -> None:
    """Even a script that does without the host if it cannot be imported."""
    script = f"""
        try:
            import {HOST}
        except ImportError:
            pass
        raise AssertionError("went on")
    """

    def refuses() -> None:
        raise ImportError(f"{HOST} 9 is not known")

    with pytest.raises(SystemExit) as refused:
        run(script, "script.py", patch=refuses)
    assert str(refused.value).startswith(f"fastclip.patch: {HOST} 9 is not known; --host NAME")


def test_every_host_has_a_patch() -> None:
    """By its own name, and without importing it."""
    for host, name in HOSTS.items():
        integration = importlib.import_module(f"fastclip.integrations.{name}")
        assert integration.HOST.package == host
        assert callable(integration.patch) and callable(integration.unpatch)
        integration.unpatch()


def test_it_is_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastclip.patch"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "usage: python -m fastclip.patch [--host NAME]" in done.stderr


def test_a_search_without_an_import(run: Callable[..., tuple[str, str]]) -> None:
    """Libraries ask whether others are installed."""
    script = f"""
        import importlib.util
        import inspect
        found = importlib.util.find_spec("{HOST}")
        assert found.origin.endswith("{HOST}.py")
        import {HOST}
        assert type({HOST}.__loader__) is type({HOST}.__spec__.loader)
        assert type({HOST}.__loader__).__module__ != "fastclip.integrations.on_import"
        print({HOST}.loss)
    """
    assert run(script, "script.py")[0] == "ours\n"


def test_functions_of_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(on_import, "_waiting", {})
    monkeypatch.syspath_prepend(str(tmp_path))
    calls: list[str] = []
    for name in ("first", "second", "third"):
        (tmp_path / f"{name}_of_the_test.py").write_text("")
        monkeypatch.delitem(sys.modules, f"{name}_of_the_test", raising=False)
        on_import.on_import(f"{name}_of_the_test", lambda name=name: calls.append(name))
    on_import.forget("second_of_the_test")
    import first_of_the_test
    import second_of_the_test

    importlib.reload(first_of_the_test)
    assert calls == ["first"] and second_of_the_test
    on_import.on_import("first_of_the_test", lambda: calls.append("again"))
    assert calls == ["first", "again"]
    with pytest.raises(ImportError):
        on_import.on_import("no_module_of_the_test", calls.clear)
        import no_module_of_the_test  # noqa: F401


@pytest.fixture
def module() -> ModuleType:
    made = ModuleType("made")
    made.kept = made.alias = object()
    return made


def test_replacements_are_undone(module: ModuleType) -> None:
    before = dict(vars(module))
    replacements = Replacements()
    replacements.replace(module, "kept", 1)
    replacements.replace(module, "kept", 2)
    replacements.replace(module, "new", 3)
    assert (module.kept, module.new) == (2, 3) and replacements
    replacements.restore()
    assert vars(module) == before and not replacements


def test_what_others_have_set_stays(module: ModuleType) -> None:
    replacements = Replacements()
    replacements.replace(module, "kept", 1)
    module.kept = 5
    replacements.restore()
    assert module.kept == 5


def test_static_methods_stay_static() -> None:
    class Kind:
        @staticmethod
        def method() -> int:
            return 1

    before = vars(Kind)["method"]
    replacements = Replacements()
    replacements.replace(Kind, "method", lambda self: 2)
    replacements.restore()
    assert vars(Kind)["method"] is before and Kind().method() == 1


def test_an_object_is_replaced_under_all_its_names(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "made", module)
    before = module.kept
    replacements = Replacements()
    new = object()
    replacements.replace_everywhere(before, new)
    assert module.kept is module.alias is new
    module.later = new  # a name that a script imports meanwhile
    replacements.restore()
    assert module.kept is module.alias is module.later is before
