"""A mismatch between ranks raises the same error on every rank, naming ranks and sizes."""

import pytest
import torch
from support.ranks import failures
from support.ranks.processes import Failed, Ranks

HARDEST = {"loss": "ranking_loss", "given": {"hardest": True}}
MISMATCHES = {
    "sizes": (
        [{"n": 4}, {"n": 5}, {"n": 4}],
        "batches of one size unless uneven=True, got rank 0: 4, rank 1: 5, rank 2: 4",
    ),
    "widths": (
        [{"n": 4}, {"n": 4}, {"n": 4, "width": 7}],
        "one width D, got rank 0: 6, rank 1: 6, rank 2: 7",
    ),
    "dtypes": (
        [{"n": 4}, {"n": 4}, {"n": 4, "dtype": torch.bfloat16}],
        "one dtype of images, got rank 0: torch.float32, rank 1: torch.float32, rank 2: "
        "torch.bfloat16",
    ),
    "dtypes of texts": (
        [{"n": 4}, {"n": 4, "dtype_y": torch.bfloat16}, {"n": 4}],
        "one dtype of texts, got rank 0: torch.float32, rank 1: torch.bfloat16",
    ),
    "autocast": ([{"n": 4}, {"n": 4, "autocast": True}, {"n": 4}], "one dtype of products, got"),
    "losses": (
        [{"n": 4}, {"n": 4, "loss": "siglip_loss"}, {"n": 4}],
        "one loss, got rank 0: clip_loss, rank 1: siglip_loss",
    ),
    "normalisation": ([{"n": 4}, {"n": 4, "normalize": True}, {"n": 4}], "one normalize, got"),
    "normalisation of gathered features": (
        [{"n": 4, **HARDEST}, {"n": 4, "normalize": True, **HARDEST}, {"n": 4, **HARDEST}],
        "one normalize, got rank 0: 0, rank 1: 1, rank 2: 0",
    ),
    "autocast beside gathered features": (
        [{"n": 4, **HARDEST}, {"n": 4, "autocast": True, **HARDEST}, {"n": 4, **HARDEST}],
        "one dtype of products, got",
    ),
    "uneven": ([{"n": 4, "uneven": True}, {"n": 5}, {"n": 4}], "one uneven, got rank 0: 1"),
    "nothing to differentiate": (
        [{"n": 4}, {"n": 4}, {"n": 4, "frozen": True}],
        "all ranks or none must have something to differentiate",
    ),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_a_mismatch_is_an_error_on_every_rank(three: Ranks, mismatch: str) -> None:
    by_rank, message = MISMATCHES[mismatch]
    for error in three.run(failures.call, by_rank):
        assert error.startswith("ValueError") and message in error, error


IDS = torch.arange(4) // 2
ODD_OPTIONS = {
    "ids": ({"ids": IDS}, "one ids, got rank 0: None, rank 1: given, rank 2: None"),
    "a reduction": ({"reduction": "sum"}, "one reduction, got rank 0: 'mean', rank 1: 'sum'"),
    "a smoothing": (
        {"label_smoothing": 0.1}, "one label_smoothing, got rank 0: 0.0, rank 1: 0.1, rank 2: 0.0"
    ),
    "two": (
        {"ids": IDS, "same_id": "positive"},
        "one ids, got rank 0: None, rank 1: given, rank 2: None; one same_id, got rank 0: "
        "'ignore', rank 1: 'positive'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD_OPTIONS)
def test_an_option_of_one_rank_alone_is_named(three: Ranks, odd: str) -> None:
    """It may change how a loss is computed, for functions and for modules."""
    given, message = ODD_OPTIONS[odd]
    of_function = three.run(failures.call, [{"n": 4}, {"n": 4, "given": given}, {"n": 4}])
    of_module = three.run(failures.call_module, [{}, given, {}])
    for error in (*of_function, *of_module):
        assert error.startswith("ValueError: all ranks must have one ") and message in error, error


def test_a_flag_of_open_clip_of_one_rank_alone_is_named(three: Ranks) -> None:
    for error in three.run(failures.call_module, [{}, {}, {"gather_with_grad": False}]):
        assert "one gather_with_grad, got rank 0: True, rank 1: True, rank 2: False" in error


def test_a_batch_without_pairs_on_all_ranks(three: Ranks) -> None:
    for loss in ("clip_loss", "siglip_loss"):
        for error in three.run(failures.call, [{"n": 0, "uneven": True, "loss": loss}] * 3):
            assert error.startswith("ValueError: the batch must not be empty, got batch rank 0: 0")


def test_sizes_may_differ_in_uneven_batches(three: Ranks) -> None:
    by_rank = [{"n": n, "uneven": True} for n in (4, 1, 7)]
    assert three.run(failures.call, by_rank) == ["no error"] * 3


def test_an_argument_refused_on_one_rank_fails_on_all(three: Ranks) -> None:
    """For losses and for `gather_features`."""
    for errors in zip(*three.run(failures.bad_calls), strict=True):
        assert errors[1].startswith("TypeError: image_features must be float64")
        for error in (errors[0], errors[2]):
            accepted = "ValueError: all ranks must have arguments that the loss accepts"
            assert error.startswith(accepted) and "rank 1" in error


def test_a_group_for_gpu_tensors_compares_only_first_calls(three: Ranks) -> None:
    """A call with other sizes or options compares anew, an uneven one always does. Mismatches are
    not remembered, so a matching call passes later."""
    four, live = (4, 4, 4), [{"live": (0, 2)}, {"live": (2, 4)}]
    uneven, mismatch = ((5, 4, 1), {"uneven": True}), ((7, 8, 7), {})
    first, known, compared = (1, "no error"), (0, "no error"), (1, "ValueError")
    calls = {
        "four": ((four, {}), first), "four again": ((four, {}), known),
        "five": (((5, 5, 5), {}), first), "four after five": ((four, {}), known),
        "ring": ((four, {"ring": True}), first), "ring again": ((four, {"ring": True}), known),
        "live": ((four, live[0]), first), "other live": ((four, live[1]), first),
        "uneven": (uneven, first), "uneven again": (uneven, first),
        "mismatch": (mismatch, compared), "mismatch again": (mismatch, compared),
        "rank 0's of the mismatch": (((7, 7, 7), {}), first),
    }  # fmt: skip
    every = [call for call, _ in calls.values()]
    for found in three.run(failures.exchanges_for_agreement, every):
        for (what, (_, expected)), (exchanges, error) in zip(calls.items(), found, strict=True):
            assert (exchanges, error.split(":")[0]) == expected, f"{what}: {error}"


def test_a_wrong_rank_argument_fails_on_all(three: Ranks) -> None:
    """For example if `rank` is left out: the default is right on rank 0 alone."""
    errors = three.run(failures.forgotten_rank)
    assert "all ranks must have arguments that the loss accepts" in errors[0]
    for rank in (1, 2):
        assert (
            f"rank and world_size must be those of this process in its group, {rank} and 3"
            in (errors[rank])
        )


def test_a_tower_frozen_on_one_rank_is_gathered_for_the_others(three: Ranks) -> None:
    assert max(three.run(failures.gathered_with_one_frozen)) < 1e-12


def test_an_overridden_loss_of_a_block_is_called(three: Ranks) -> None:
    assert three.run(failures.own_block) == [6.0] * 3


def test_rows_of_zeros_in_fp16_have_no_gradient(three: Ranks) -> None:
    """Their gradient is zero, not infinite, even if products have a wider dtype. All other rows
    have a gradient, in both towers and on every rank."""
    assert three.run(failures.zero_rows_in_fp16) == [[True] * 4] * 3


def test_modules_check_rank_and_world_size(three: Ranks) -> None:
    for rank, errors in enumerate(three.run(failures.module_errors)):
        assert len(errors) == 2
        assert all(f"{rank} and 3, got" in error for error in errors)


def test_no_second_derivative(three: Ranks) -> None:
    for error in three.run(failures.double_backward):
        assert "no second derivative" in error


def test_a_group_within_a_larger_world(four: Ranks) -> None:
    """For functions and for modules."""
    found = four.run(failures.in_group_of_odd_ranks)
    for rank in (1, 3):
        assert len(found[rank]) == 2 * 6 and max(found[rank]) < 1e-12
    for rank in (0, 2):
        assert "process_group must have this process among its ranks" in found[rank][0]


def test_a_killed_rank_ends_the_others(four: Ranks) -> None:
    """All others raise within the group's timeout, even a rank that is no neighbour of the dead one
    in the ring."""
    seconds = 4.0
    found = four.outcomes(failures.dies, seconds)
    assert isinstance(found[0], Failed) and "died" in str(found[0])
    for result in found[1:]:
        assert not isinstance(result, Failed) and len(result) == 4, result
        for what, (error, spent) in result.items():
            assert error.startswith("RuntimeError") and spent < 5 * seconds, (what, error, spent)
