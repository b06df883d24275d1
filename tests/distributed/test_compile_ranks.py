"""Losses across ranks compile into one graph, with the values and gradients of eager mode.

All tests share one pool of three ranks; worlds of two ranks are groups within it.
"""

import shutil
from itertools import product

import pytest
import torch
from support.ranks import compile, modules
from support.ranks.compile import Case
from support.ranks.processes import Ranks
from torch._dynamo.testing import CompileCounterWithBackend

from fastclip import distributed
from fastclip.distributed.calls import ContrastCall, LossCall
from fastclip.distributed.compiled import call as compiled_call
from fastclip.distributed.gradient_mode import GradientMode
from fastclip.engine.beside import Given


def assert_like_eager(three: Ranks, cases: list[Case], allowed: float = 1e-6) -> None:
    """Asserts eager mode's results, and one graph for all batch sizes."""
    of_cases = zip(*three.run(compile.compiled, cases), strict=True)
    for case, found in zip(cases, of_cases, strict=True):
        for graphs, mistake in found[: case.ranks]:
            # Dynamo may restart once at the first size.
            assert graphs[-1] == graphs[0], f"{case}: {graphs} graphs"
            assert mistake <= allowed, f"{case}: {mistake:.1e}"


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_losses(three: Ranks, ring: bool) -> None:
    """An input that is frozen on one rank still gets its gradient on the others."""
    frozen = ((1, "y"), (0, "scale"))
    assert_like_eager(three, [
        Case("clip_loss", {"ring": ring, "normalize": True}, frozen=frozen),
        Case("siglip_loss", {"ring": ring, "live": (1, 4)}, ranks=3 if ring else 2),
        Case("siglip_loss", {"ring": ring}, frozen=frozen),
    ])  # fmt: skip


def test_open_clips_gradient_modes(three: Ranks) -> None:
    cases = []
    for k, (local, grad) in enumerate(product((False, True), repeat=2)):
        options = {"local_loss": local, "gather_with_grad": grad, "ring": k in (1, 2)}
        cases.append(Case("ClipLoss", options, ranks=2 + k % 2))
    cases.append(Case("SigLipLoss", {"dist_impl": "bidir"}, sizes=(6,), dtype=torch.bfloat16))
    assert_like_eager(three, cases)


EVERYTHING = {"same_id": "positive", "false_negative_margin": 0.3, "normalize": True}


def test_statistics(three: Ranks) -> None:
    """With all options, with rows that have no positive, with more columns than rows."""
    assert_like_eager(three, [
        Case(
            "contrast", {**EVERYTHING, "offset": 1}, ranks=3, ids=True, key_bias=True,
            frozen=((1, "key_bias"), (0, "y")),
        ),
        Case("contrast", {**EVERYTHING, "ring": True}, ids=True, frozen=((0, "x"),)),
        Case(
            "contrast", {"kind": "sigmoid", "columns": False, "offset": None}, sizes=(6,), wider=3
        ),
    ])  # fmt: skip


def test_labels_means_and_one_set(three: Ranks) -> None:
    one_set = {"means": True, "same_id": "positive", "normalize": True}
    assert_like_eager(three, [
        Case(
            "contrast", {**EVERYTHING, "means": True, "ring": True}, ids=True, labels=True,
            key_bias=True, wider=2, frozen=((0, "y"),),
        ),
        Case("contrast", one_set, ids=True, one_set=True, frozen=((0, "scale"),)),
    ])  # fmt: skip


@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
def test_inductor(three: Ranks) -> None:
    assert_like_eager(three, [
        Case("siglip_loss", {"normalize": True}, frozen=((1, "y"),), backend="inductor"),
    ], 1e-5)  # fmt: skip


def test_values_without_gradients(three: Ranks) -> None:
    for ours, eager in three.run(compile.without_gradients):
        assert ours == eager


SHAPES = [
    Case("clip_loss", {"normalize": True}, ranks=3),
    Case("clip_loss", {"ring": True}, ranks=3, dtype=torch.bfloat16),
    Case("siglip_loss", {}, ranks=3, frozen=((0, "y"), (1, "y"), (2, "y"))),
    Case("contrast", {**EVERYTHING, "offset": 1}, ranks=3, ids=True, key_bias=True),
    Case("contrast", {**EVERYTHING, "ring": True}, ranks=3, ids=True),
    Case("contrast", {**EVERYTHING, "means": True}, ranks=3, ids=True, labels=True, key_bias=True),
    Case("contrast", {"means": True}, ranks=3, labels=True, wider=2),
    Case("contrast", {"means": True, "same_id": "positive"}, ranks=3, ids=True, one_set=True),
]


def test_fakes_have_the_shapes_of_results(three: Ranks) -> None:
    """A fake's shapes hold on every rank, since ranks share the graphs that compilers keep on disk.
    No result shares memory with another one or with an input."""
    of_cases = zip(*three.run(compile.shapes, SHAPES), strict=True)
    for case, found in zip(SHAPES, of_cases, strict=True):
        for real, fake in found:
            name = "fastclip::rank_contrast" if case.name == "contrast" else "fastclip::rank_loss"
            assert real[name] == fake[name] == found[0][0][name], case
            assert real[name + "_backward"] == fake[name + "_backward"], case
            assert real[name + " apart"] == [(True,)], case
            assert real[name + "_backward apart"] == [(True,)], case


MISMATCHES = {
    "sizes": ("clip_loss", {}, {"m": 5, "n": 5}, "all ranks must have batches of one size"),
    "options": ("clip_loss", {}, {"normalize": True}, "one normalize, got"),
    "statistics": ("contrast", {}, {"n": 5}, "one number of columns unless uneven=True"),
}
REFUSED = {
    "shapes": ("clip_loss", {"n": 5}, "must have one shape (N, D)"),
    "a backend": ("siglip_loss", {"backend": "other"}, "backend must be None or one of"),
    "a scale": ("clip_loss", {"scale": torch.ones(2)}, "logit_scale must have one element"),
    "an empty side": ("contrast", {"m": 0}, "the batch must not be empty"),
    "labels": ("contrast", {"labels": torch.full((4,), 4)}, "labels must be columns, 0 <= label <"),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_a_mismatch_is_an_error_on_every_rank(three: Ranks, mismatch: str) -> None:
    name, usual, other, message = MISMATCHES[mismatch]
    for ours, eager in three.run(compile.errors, [(name, usual)] * 2 + [(name, other)]):
        assert message in ours and ours == eager, ours


@pytest.mark.parametrize("what", REFUSED)
def test_an_argument_refused_on_one_rank_fails_on_all(three: Ranks, what: str) -> None:
    name, options, message = REFUSED[what]
    found = three.run(compile.errors, [(name, {}), (name, options), (name, {})])
    others = "all ranks must have arguments that the loss accepts, got others on rank 1"
    for rank, (ours, eager) in enumerate(found):
        assert (message if rank == 1 else others) in ours and ours == eager, ours


@pytest.mark.parametrize("around", ["the step", "DDP"])
def test_a_training_step_compiles_whole(three: Ranks, around: str) -> None:
    assert max(three.run(compile.training_step, around)) < 1e-12


def test_local_negatives_warn_once_and_break_no_graph(three: Ranks) -> None:
    for (text,), difference in three.run(modules.local, "ClipLoss", True):
        assert text.startswith("ClipLoss with world_size=1 takes negatives from this rank alone")
        assert difference < 1e-6


def test_no_second_derivative(three: Ranks) -> None:
    for error in three.run(compile.second_derivative):
        assert "no second derivative" in error


def test_uneven_batches_cut_the_graph(three: Ranks) -> None:
    for mistake, graphs in three.run(compile.uneven):
        assert mistake < 1e-6 and graphs == 2


@pytest.mark.parametrize("loss", ["clip_loss", "contrast"])
def test_a_process_alone(loss: str) -> None:
    """A loss compiles in a process without a group, too."""

    def step(*inputs: torch.Tensor) -> torch.Tensor:
        found = getattr(distributed, loss)(*inputs, normalize=True)
        return found if loss == "clip_loss" else (found.rows + found.columns).mean()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for n in (5, 9):
        inputs = compile.inputs_of(Case(loss, {}), n, 0)[:4]
        eager, ours = (compile.results(f, inputs, 2.0) for f in (step, fast))
        torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1


def test_a_group_of_another_size_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error before any exchange, such as for a loss compiled before its group existed."""

    def two(group: str) -> int:
        return 2

    two._dynamo_marked_constant = True
    monkeypatch.setattr(compiled_call, "_ranks_of", two)
    torch._dynamo.reset()
    fast = torch.compile(distributed.clip_loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="of 2 ranks, got one of 1"):
        fast(*torch.randn(2, 5, 8).unbind(), 2.0)


@pytest.mark.parametrize("name", ["rank_loss", "rank_contrast"])
def test_operators_are_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pass `torch.library.opcheck` in a world of one. Other tests trace dynamic sizes."""
    called = []
    operator = getattr(torch.ops.fastclip, name)

    def listening(*arguments: object) -> list[torch.Tensor]:
        called.append(arguments)
        return operator(*arguments)

    inputs = [t.requires_grad_() for t in torch.randn(2, 5, 8)] + [torch.tensor(2.0)]
    monkeypatch.setattr(torch.ops.fastclip, name, listening)
    if name == "rank_loss":
        call = LossCall(
            "sigmoid", GradientMode(), False, True, None, None, None, None, "siglip_loss()"
        )
        compiled_call.traced_loss((*inputs, None), None, call)
    else:
        call = ContrastCall(same_id="positive", means=True, normalize=True)
        ids = torch.arange(5) // 2
        others = None, torch.randn(5), Given((ids, ids), 0.1)
        compiled_call.traced_contrast((*inputs, *others), None, call)
    monkeypatch.undo()
    ((arguments,),) = [called]
    asked = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(operator.default, arguments, test_utils=asked)
