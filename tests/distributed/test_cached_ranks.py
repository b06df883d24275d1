"""`cached_step` across ranks: gradients of one process; an error of one rank is one of all."""

import pytest
from support.ranks import cached
from support.ranks.processes import Ranks


def test_a_model_inside_ddp_has_a_fake_curve(two: Ranks) -> None:
    """Each rank follows its own gradients: ranks drift apart, and the loss falls as it should not.
    The warning is given once."""
    for losses, whole, warned, apart in two.run(cached.curve, "inside"):
        assert losses[0] == pytest.approx(whole[0], rel=1e-12)
        assert abs(losses[-1] - whole[-1]) > 0.01 and apart > 0.1
        assert len(warned) == 1 and "neither DDP nor FSDP" in warned[0]
        assert "a group of 2 ranks" in warned[0] and "backward=" in warned[0]


def test_the_wrapped_model_has_the_curve_of_one_process(two: Ranks) -> None:
    for losses, whole, warned, apart in two.run(cached.curve, "wrapped"):
        assert losses == pytest.approx(whole, rel=1e-10)
        assert not warned and apart == 0


@pytest.mark.parametrize(
    "how", ["closure", "default", "keyword default", "method", "closure of an object"]
)
def test_ddp_behind_a_function(two: Ranks, how: str) -> None:
    for error, exchanges in two.run(cached.in_a_function, how):
        assert error < 1e-12 and exchanges == 1


def test_hidden_ddp_with_a_backward_of_the_caller(two: Ranks) -> None:
    """It exchanges with each micro-batch, as Lightning's does, and then expects a gradient of every
    parameter."""
    for error, exchanges in two.run(cached.in_a_function, "hidden"):
        assert error < 1e-12 and exchanges == 3


def test_two_towers_in_ddp(two: Ranks) -> None:
    for error, exchanges in two.run(cached.two_towers):
        assert error < 1e-12 and exchanges == [1, 1]


def test_a_rank_without_pairs(two: Ranks) -> None:
    assert max(two.run(cached.one_rank_is_empty)) < 1e-12


def test_without_gradients(two: Ranks) -> None:
    for value, exact, gradients in two.run(cached.without_gradients):
        assert value == pytest.approx(exact, rel=1e-12) and gradients == 0


OWN_ERRORS = {
    "rows": "ValueError: all inputs must have one number of rows",
    "micro_batch": "ValueError: micro_batch must be at least 1",
    "outputs": "ValueError: the model must return a row for each of the 4 rows",
    "model": "OSError: no file",
    "loss": "OSError: no file",
    "again": "OSError: no memory",
    "encodings": "RuntimeError: cached_step encodes each micro-batch twice",
}
OTHERS = {
    "rows": "all ranks must have arguments that it accepts, got an error on rank 1",
    "micro_batch": "all ranks must have arguments that it accepts, got an error on rank 1",
    "outputs": "all ranks must have a model that encodes their inputs, got an error on rank 1",
    "model": "all ranks must have a model that encodes their inputs, got an error on rank 1",
    "loss": "all ranks must have arguments that the loss accepts, got others on rank 1",
    "again": "all ranks must have a model that encodes them again, got an error on rank 1",
    "encodings": "got a difference in another rank",
}


@pytest.mark.parametrize("how", ["ddp", "function", "module", "backward"])
@pytest.mark.parametrize("fault", OWN_ERRORS)
def test_a_misfit_is_an_error_on_all_ranks(two: Ranks, fault: str, how: str) -> None:
    (other, waited), (culprit, _) = two.run(cached.misfit, fault, how)
    assert culprit.startswith(OWN_ERRORS[fault]) and OTHERS[fault] in other
    assert waited < 20  # the group's timeout is 30 minutes


def test_an_error_after_the_loss_is_one_on_all_ranks(two: Ranks) -> None:
    """The other ranks must hear of it before the loss's backward, which exchanges gradients."""
    (other, waited), (culprit, _) = two.run(cached.misfit, "after the loss", "ddp")
    assert culprit == "OSError: no file" and waited < 20
    assert "all ranks must have a loss of their outputs, got an error on rank 1" in other


def test_ranks_outside_the_loss_s_group_hear_of_its_error(three: Ranks) -> None:
    first, (culprit, _), (other, waited) = three.run(cached.refused_in_a_smaller_group)
    assert first[0].startswith("ValueError") and culprit.startswith("TypeError: logit_scale")
    assert "all ranks must have a loss of their outputs, got an error on rank" in other
    assert waited < 20


def test_options_that_differ(two: Ranks) -> None:
    for error, _ in two.run(cached.misfit, "check", "ddp"):
        assert "all ranks must have the same check, got rank 0: 1, rank 1: 0" in error


@pytest.mark.parametrize("kind", ["fsdp", "buffers", "statistics", "plain"])
def test_numbers_of_micro_batches(two: Ranks, kind: str) -> None:
    """Each forward of FSDP, and of DDP with buffers or SyncBatchNorm, is an exchange."""
    for error in two.run(cached.different_numbers, kind):
        expected = "all ranks must have the same number of micro-batches, got rank 0: 3, rank 1: 2"
        assert error == "none" if kind == "plain" else expected in error
