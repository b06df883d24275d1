"""transformers' Trainer with a fused model: the gradients' size, ranks, evaluation."""

from typing import Any

import pytest
import torch
from support.peers import find
from support.ranks import two_towers
from support.ranks.processes import Ranks
from torch import Tensor

NAME = "CLIPModel"


@pytest.fixture(scope="module", autouse=True)
def transformers() -> None:
    find("transformers")


def assert_same(
    found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 1e-9
) -> None:
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def run(ranks: Ranks, fused: bool, rows: list[int], **arguments: Any) -> list[dict[str, Any]]:
    return ranks.run(two_towers.trained, NAME, fused, rows, arguments)


def moved(result: dict[str, Any]) -> float:
    start = two_towers.without_dropout(NAME).named_parameters()
    return max(float((result["parameters"][n] - p.detach()).abs().max()) for n, p in start)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_accumulation(one: Ranks, accumulation: int) -> None:
    """The step is that of their loss: the mean over micro-batches, each with its own negatives."""
    options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 3}
    (ours,), (theirs,) = (run(one, fused, list(range(12)), **options) for fused in (True, False))
    assert moved(theirs) > 1e-3
    assert_same(ours["parameters"], theirs["parameters"])
    assert len(ours["losses"]) == 4 // accumulation
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
    assert not ours["logits"] and theirs["logits"]


def test_accumulation_does_not_change_the_size_of_a_step(one: Ranks) -> None:
    """Four times the same rows."""
    rows, batch = [0, 1, 2, 3], {"per_device_train_batch_size": 4}
    (once,), (four,) = (
        run(one, True, rows * k, gradient_accumulation_steps=k, **batch) for k in (1, 4)
    )
    assert_same(four["parameters"], once["parameters"])


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_are_one_process(one: Ranks, two: Ranks, name: str, accumulation: int) -> None:
    """The last step has 3 rows on one rank and 1 on the other."""
    # Batches of one process, in the order in which ranks take theirs.
    rows = [*range(12), 0, 1, 2, 3]
    options = {
        "accelerator_config": {"even_batches": False},
        "gradient_accumulation_steps": accumulation,
    }
    batch = "per_device_train_batch_size"
    found = two.run(two_towers.trained, name, True, rows, options | {batch: 3})
    (exact,) = one.run(two_towers.trained, name, False, rows, options | {batch: 6})
    for result in found:
        assert_same(result["parameters"], exact["parameters"])
        assert result["losses"] == pytest.approx(exact["losses"], abs=1e-4)
    # Theirs takes negatives from the own rank alone.
    local = two.run(two_towers.trained, name, False, rows, options | {batch: 3})
    assert abs(local[0]["losses"][0] - exact["losses"][0]) > 0.1


def test_evaluation_is_theirs(one: Ranks, two: Ranks) -> None:
    """With two ranks, each evaluates its own batches. The outputs are collected, or not."""
    for ranks in (one, two):
        for only in (True, False):
            # Without a step, since their loss of two ranks trains another model.
            options = {"max_steps": 1, "learning_rate": 0.0, "prediction_loss_only": only}
            ours, theirs = (
                run(ranks, fused, list(range(12)), **options) for fused in (True, False)
            )
            for a, b in zip(ours, theirs, strict=True):
                assert a["evaluation"] == pytest.approx(b["evaluation"], abs=1e-6)


@pytest.mark.parametrize("how", ["gradient_checkpointing", "torch_compile"])
def test_checkpointing_and_compilation(one: Ranks, two: Ranks, how: str) -> None:
    options = {how: True, "per_device_train_batch_size": 3, "max_steps": 2}
    if how == "torch_compile":
        options["torch_compile_backend"] = "aot_eager"
    for ranks in (one,) if how == "torch_compile" else (one, two):
        compiled, plain = (
            run(ranks, True, list(range(12)), **options | {how: on}) for on in (True, False)
        )
        for a, b in zip(compiled, plain, strict=True):
            assert_same(a["parameters"], b["parameters"])


def test_bfloat16(one: Ranks) -> None:
    """Accelerate replaces the model's forward for the training, and unwraps it to save it."""
    options = {"bf16": True, "max_steps": 2, "per_device_train_batch_size": 6}
    (ours,), (exact,) = (run(one, True, list(range(12)), **options | {"bf16": on})
                         for on in (True, False))  # fmt: skip
    assert not ours["logits"]
    assert_same(ours["parameters"], exact["parameters"], tolerance=0.02)
    for key, value in ours["parameters"].items():
        assert torch.equal(ours["saved"][key], value)
