"""The choice of the CUDA engine: reasons against it, and its order relative to Triton's."""

import importlib
import math
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator

import pytest
import torch
from support.pretended_card import ALL_CARDS, CPU, CUDA, backends, nothing_known, pretend

from fastclip import kinds
from fastclip.engine import preference
from fastclip.engine.preference import Row

HALF, FLOAT = torch.bfloat16, torch.float32


@pytest.fixture
def fresh() -> Iterator[pytest.MonkeyPatch]:
    with nothing_known() as patch:
        yield patch


def choose(asked: str | None, dtype: torch.dtype, logits: int = 1 << 30, d: int = 512) -> str:
    return backends.choose(asked, CUDA, dtype, logits, d)


# ---- availability --------------------------------------------------------------------------------


def test_the_reason_for_its_absence_is_given(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh)
    assert backends.backends()["cuda"] == "fastclip was built without it: there is no nvcc on PATH"
    with pytest.raises(ValueError, match=r"'cuda' cannot run here .*no nvcc on PATH.*'triton'"):
        choose("cuda", HALF)


def test_without_the_compiled_module_the_reason_is_the_modules(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh)
    fresh.setattr(backends, "_MODULE", None)
    fresh.setattr(backends, "_CPU_AVAILABILITY", "the compiled module was not built")
    assert backends.backends()["cuda"] == "the compiled module was not built"


def test_without_a_card_the_reason_says_so(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh, compiled_for=ALL_CARDS)
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.backends()["cuda"] == "no CUDA device is available"


def test_the_capability_of_an_old_card_is_named(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh, (7, 5), compiled_for=ALL_CARDS)
    expected = "it needs a CUDA device of capability 8.0 or more, got 7.5"
    assert backends.backends()["cuda"] == backends.backends()["triton"] == expected


def test_a_card_that_the_engine_was_not_compiled_for_is_named(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh, (12, 0), compiled_for=("sm_80", "sm_90a"))
    reason = backends.backends()["cuda"]
    assert "compiled for sm_80, sm_90a" in reason and "TORCH_CUDA_ARCH_LIST=12.0" in reason


@pytest.mark.parametrize(
    "code, runs_on, not_on",
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("sm_86", [(8, 6), (8, 7), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0)]),
        ("compute_90", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("compute_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("compute_120", [(12, 0), (13, 0)], [(10, 3), (11, 0)]),
    ],
)
def test_code_for_one_card_runs_on_others(code: str, runs_on: list, not_on: list) -> None:
    assert all(backends._runs_on(code, capability) for capability in runs_on)
    assert not any(backends._runs_on(code, capability) for capability in not_on)


def test_cpu_tensors_are_an_error(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh, compiled_for=ALL_CARDS)
    with pytest.raises(ValueError, match="'cuda' takes CUDA tensors, got tensors on cpu"):
        backends.choose("cuda", CPU, FLOAT, 1000, 512)


# ---- preference ----------------------------------------------------------------------------------


@pytest.fixture
def precision() -> Iterator[types.ModuleType]:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


@pytest.mark.parametrize(
    "dtype, fp32, first, second",
    [
        (torch.bfloat16, "ieee", "triton", "cuda"),
        (torch.float16, "ieee", "triton", "cuda"),
        (torch.float32, "tf32", "triton", "cuda"),
        (torch.float32, "ieee", "cuda", "triton"),
    ],
)
def test_the_order_follows_the_arithmetic(
    fresh: pytest.MonkeyPatch, precision: types.ModuleType, dtype: torch.dtype, fp32: str,
    first: str, second: str,
) -> None:  # fmt: skip
    """If the first engine cannot run, the second serves without a warning."""
    precision.fp32_precision = fp32
    pretend(fresh, compiled_for=ALL_CARDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(None, dtype) == first
        backends._AVAILABILITY[first, 0] = "it is ill"
        assert choose(None, dtype) == second


def test_small_blocks_of_half_precision_take_the_faster_launches(fresh: pytest.MonkeyPatch) -> None:
    """C++ launches faster than Python. An exported graph has one engine for all sizes."""
    pretend(fresh, compiled_for=ALL_CARDS)
    sizes = (8192**2, 16383**2, 16384**2)
    assert [choose(None, HALF, size) for size in sizes] == ["cuda", "cuda", "triton"]
    fresh.setattr(torch.compiler, "is_exporting", lambda: True)
    assert [choose(None, HALF, size) for size in sizes] == ["triton"] * 3


def test_the_older_setting_of_tf32_is_obeyed(
    fresh: pytest.MonkeyPatch, precision: types.ModuleType
) -> None:
    pretend(fresh, compiled_for=ALL_CARDS)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert choose(None, FLOAT) == "triton"
        torch.set_float32_matmul_precision("highest")
        assert choose(None, FLOAT) == "cuda"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("triton", [None, "3.1.0"])
def test_cuda_serves_without_a_usable_triton(fresh: pytest.MonkeyPatch, triton: str | None) -> None:
    pretend(fresh, triton=triton, compiled_for=ALL_CARDS)
    assert choose(None, HALF) == "cuda"


def test_if_neither_can_run_one_warning_gives_both_reasons(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh, triton="3.1.0")
    with pytest.warns(UserWarning, match="plain PyTorch engine on cuda tensors") as caught:
        assert choose(None, HALF) == choose(None, HALF) == "torch"
    (warning,) = caught
    assert "triton: it needs Triton 3.6 or later, got 3.1.0" in str(warning.message)
    assert "cuda: fastclip was built without it: there is no nvcc" in str(warning.message)


@pytest.mark.parametrize("asked", [None, "cuda"])
def test_float64_takes_the_plain_engine_without_a_warning(
    fresh: pytest.MonkeyPatch, asked: str | None
) -> None:
    pretend(fresh, compiled_for=ALL_CARDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(asked, torch.float64) == "torch"


def test_a_kind_without_kernels_takes_the_plain_engine(fresh: pytest.MonkeyPatch) -> None:
    """Without a warning. Asking for an engine by name is an error."""
    pretend(fresh, compiled_for=ALL_CARDS)
    fresh.setitem(kinds.KINDS, "cubic", kinds.Sigmoid)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(None, CUDA, HALF, 1000, 512, "cubic") == "torch"
        assert backends.choose("torch", CUDA, HALF, 1000, 512, "cubic") == "torch"
    for engine in ("cuda", "triton"):
        with pytest.raises(ValueError, match=rf"^kind 'cubic' must be one that backend '{engine}'"):
            backends.choose(engine, CUDA, HALF, 1000, 512, "cubic")


def test_the_table_always_has_an_answer() -> None:
    assert preference.TABLE[-1]._replace(engines=()) == Row(())
    assert all(set(row.engines) <= set(backends._FINDERS) for row in preference.TABLE)


def test_rows_match_by_card_arithmetic_and_sizes(fresh: pytest.MonkeyPatch) -> None:
    """The first row that matches is taken. Ranges exclude their end."""
    pretend(fresh, (9, 0), compiled_for=ALL_CARDS)
    fallback = Row(("triton",))

    def chosen(row: Row, dtype: torch.dtype = HALF, logits: int = 1000, d: int = 512) -> bool:
        fresh.setattr(preference, "TABLE", (row, fallback))
        return choose(None, dtype, logits, d) == "cuda"

    assert chosen(Row(("cuda",)))
    assert chosen(Row(("cuda",), arithmetic="half")) and not chosen(
        Row(("cuda",), arithmetic="tf32")
    )
    assert chosen(Row(("cuda",), capability=((9, 0), (10, 0))))
    assert not chosen(Row(("cuda",), capability=((8, 0), (9, 0))))
    by_size, by_d = Row(("cuda",), logits=(256, 1024)), Row(("cuda",), d=(0, 512))
    assert [chosen(by_size, logits=n) for n in (255, 256, 1023, 1024)] == [False, True, True, False]
    assert [chosen(by_d, d=d) for d in (511, 512)] == [True, False]
    assert not chosen(Row(("cuda",), logits=(0, math.inf), d=(0, 10)))


# ---- FASTCLIP_GPU --------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["cuda", "triton", "torch"])
def test_the_environment_overrules_the_table_and_an_argument_overrules_both(
    fresh: pytest.MonkeyPatch, asked: str
) -> None:
    pretend(fresh, compiled_for=ALL_CARDS)
    fresh.setenv("FASTCLIP_GPU", asked)
    for dtype in (HALF, FLOAT):
        assert choose(None, dtype) == asked
        assert choose("triton", dtype) == "triton"
    assert choose(None, torch.float64) == "torch"
    assert backends.choose(None, CPU, FLOAT, 1000, 512) in ("cpu", "torch")


def test_a_wrong_setting_in_the_environment_is_an_error(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh)
    fresh.setenv("FASTCLIP_GPU", "")
    assert choose(None, HALF) == "triton"
    fresh.setenv("FASTCLIP_GPU", "cpu")
    expected = r"^FASTCLIP_GPU must be one of 'cuda', 'triton', 'torch', got 'cpu'$"
    with pytest.raises(ValueError, match=expected):
        choose(None, HALF)
    fresh.setenv("FASTCLIP_GPU", "cuda")
    with pytest.raises(ValueError, match="'cuda' cannot run here"):
        choose(None, HALF)


# ---- torch.compile, imports, forks ---------------------------------------------------------------


def test_torch_compile_sees_a_constant(fresh: pytest.MonkeyPatch) -> None:
    """There is one graph, compiled once for all batch sizes."""
    importlib.import_module("torch._dynamo").reset()
    # Availability is set in advance, because the compiler itself would use a pretended card.
    fresh.setattr(backends, "_AVAILABILITY", {("cuda", 0): "available", ("triton", 0): "it is ill"})
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=count, fullgraph=True, dynamic=True)
    def f(x: torch.Tensor) -> torch.Tensor:
        return x * len(backends.choose(None, CUDA, HALF, x.shape[0], x.shape[1]))

    with warnings.catch_warnings():
        # torch.compile warns of functions that it should not have to trace.
        warnings.filterwarnings("error", module=r"torch\._dynamo")
        for n in (5, 7, 300):
            assert torch.equal(f(torch.ones(n, 3)), torch.full((n, 3), float(len("cuda"))))
    assert len(graphs) == 1


def test_importing_does_not_initialise_cuda() -> None:
    """Importing asks nothing of a card: a forked process may import fastclip."""
    code = (
        "import torch\n"
        "def refuse(*arguments): raise AssertionError('CUDA was asked')\n"
        "torch.cuda._lazy_init = torch.cuda.is_available = refuse\n"
        "import fastclip, fastclip.distributed, fastclip.loss"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_named_backend_does_not_query_others(fresh: pytest.MonkeyPatch, name: str) -> None:
    """In a process forked from one that uses CUDA, a query of the GPU is an error."""

    def refuse(engine: str, device: int | None) -> str:
        raise AssertionError(f"asked for {engine}")

    fresh.setattr(backends, "_availability", refuse)
    assert backends.choose(name, CPU, torch.float32, 8, 8) == name
