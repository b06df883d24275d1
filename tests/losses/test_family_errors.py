"""Each wrong argument of a loss of the family raises an error with the rule and what was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE
from support.family import CASES, Case, call, of_batch, tensors
from support.judge import PRECISIONS

from fastclip import loss
from fastclip.loss import GlobalClipLoss, clip_loss, siglip_loss

N = 5
IDS = torch.arange(N)

# Options of info_nce with 5 queries and 5 keys.
OPTIONS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a margin that is no number": (TypeError, r"margin must be a number, got str", {"margin": "1"}),
    "a bool": (TypeError, r"margin must be a number, got bool", {"margin": True}),
    "an infinite margin": (ValueError, r"margin must be finite.*got inf", {"margin": float("inf")}),
    "a NaN": (ValueError, r"margin must be finite.*got nan", {"margin": float("nan")}),
    "smoothing": (ValueError, r"label_smoothing.*\[0.0, 1.0\), got 1.0", {"label_smoothing": 1.0}),
    "negative smoothing": (ValueError, r"label_smoothing.*got -0.1", {"label_smoothing": -0.1}),
    "hardness": (ValueError, r"hardness.*\[0.0, inf\), got -1.0", {"hardness": -1.0}),
    "an offset beyond": (
        ValueError, r"0 <= offset <= N - M, got offset 1, M 5 and N 5", {"offset": 1}
    ),
    "a negative offset": (ValueError, r"0 <= offset.*got offset -1", {"offset": -1}),
    "no offset": (ValueError, r"offset must be an int unless same_id='positive'", {"offset": None}),
    "a real offset": (TypeError, r"offset must be an int or None, got float", {"offset": 0.0}),
    "labels both ways": (
        ValueError, r"exclude each other, got both: labels and symmetric=True",
        {"labels": IDS, "symmetric": True},
    ),
    "smoothing with a margin": (
        ValueError, r"got both: label_smoothing and margin", {"label_smoothing": 0.1, "margin": 0.1}
    ),
    "smoothing with hardness": (
        ValueError, r"got both: label_smoothing and hardness",
        {"label_smoothing": 0.1, "hardness": 1.0},
    ),
    "smoothing with false negatives": (
        ValueError, r"got both: label_smoothing and false_negative_margin",
        {"label_smoothing": 0.1, "false_negative_margin": 0.0},
    ),
    "hardness with positives by id": (
        ValueError, r"got both: hardness and same_id='positive'",
        {"hardness": 1.0, "same_id": "positive", "ids": (IDS, IDS)},
    ),
    "no offset both ways": (
        ValueError, r"got both: symmetric=True and offset=None",
        {"offset": None, "symmetric": True, "same_id": "positive", "ids": (IDS, IDS)},
    ),
    "an unknown same_id": (
        ValueError, r"same_id must be one of.*got 'both'", {"same_id": "both", "ids": (IDS, IDS)}
    ),
    "positives without ids": (ValueError, r"same_id='positive' needs ids", {"same_id": "positive"}),
    "one tensor of ids": (TypeError, r"ids must be a pair.*got Tensor", {"ids": IDS}),
    "few ids": (ValueError, r"x_ids must have an id.*\(5,\), got \(4,\)", {"ids": (IDS[:4], IDS)}),
    "labels beyond": (ValueError, r"0 <= label < 5, got 1 to 5", {"labels": IDS + 1}),
    "a long bias": (ValueError, r"key_bias must have.*got \(6,\)", {"key_bias": torch.zeros(6)}),
}  # fmt: skip

# Options that every loss has.
COMMON: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "reduction": (ValueError, r"reduction must be one of.*got 'median'", {"reduction": "median"}),
    "weights": (TypeError, r"weights must be a torch.Tensor, got list", {"weights": [1.0] * N}),
    "integer weights": (TypeError, r"weights must be float.*got torch.int64", {"weights": IDS}),
    "few weights": (
        ValueError, r"weights must have a weight for each row.*\(5,\), got \(4,\)",
        {"weights": torch.ones(4)},
    ),
    "backend": (ValueError, r"backend.*'gpu'", {"backend": "gpu"}),
    "budget": (ValueError, r"memory_budget.*bytes.*-1", {"memory_budget": -1}),
}  # fmt: skip

# One case of each function, and the one that is not written on line statistics.
FUNCTIONS = {case.loss: case._replace(options={}, given=()) for case in CASES.values()}
FUNCTIONS["hardest"] = CASES["hardest"]._replace(given=())
# Arguments are checked before an engine is chosen, and before a dense form runs.
of_backends = pytest.mark.parametrize("asked", [None, "reference"])


def inputs(case: Case) -> dict[str, Any]:
    return tensors(case, of_batch(case, "random", N, 4), PRECISIONS["float32"], DEVICE)


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return value.to(DEVICE) if isinstance(value, torch.Tensor) else value

    return {name: moved(value) for name, value in options.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options_of_info_nce(name: str, engine: str) -> None:
    error, pattern, options = OPTIONS[name]
    case = CASES["info_nce"]
    for backend in (engine, "reference"):
        with pytest.raises(error, match=pattern):
            call(case, loss, inputs(case), backend=backend, **on_device(options))


@of_backends
@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_options_of_every_loss(function: str, name: str, asked: str | None) -> None:
    error, pattern, options = COMMON[name]
    case = FUNCTIONS[function]._replace(more_keys=0)
    with pytest.raises(error, match=pattern):
        call(case, loss, inputs(case), **{"backend": asked, **on_device(options)})


WRONG = {
    "a list": (TypeError, r"must be a torch.Tensor, got list", lambda x: x.tolist()),
    "integers": (TypeError, r"must be float.*got torch.int64", lambda x: x.detach().long()),
    "one feature": (ValueError, r"got shape \(4,\)", lambda x: x[0]),
    "no rows": (ValueError, r"must not be empty", lambda x: x[:0]),
}


@of_backends
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_features(function: str, name: str, asked: str | None) -> None:
    error, pattern, change = WRONG[name]
    case = FUNCTIONS[function]._replace(more_keys=0)
    t = inputs(case)
    t["classes"] = t["classes"][:0] if name == "no rows" else t["classes"]
    wrong = {key: change(t[key]) for key in ("x", "y", "teacher_x", "teacher_y")}
    with pytest.raises(error, match=pattern):
        call(case, loss, {**t, **wrong}, backend=asked)


@of_backends
@pytest.mark.parametrize("function", [f for f, c in FUNCTIONS.items() if "scale" in c.leaves])
def test_wrong_scales(function: str, asked: str | None) -> None:
    case = FUNCTIONS[function]._replace(more_keys=0)
    for scale, error in (("2", TypeError), (torch.ones(2, device=DEVICE), ValueError)):
        with pytest.raises(error, match="logit_scale must"):
            call(case, loss, {**inputs(case), "scale": scale}, backend=asked)


def test_labels_need_features_that_are_tensors() -> None:
    labels = IDS.to(DEVICE)
    with pytest.raises(TypeError, match=r"must be a torch.Tensor, got list"):
        loss.info_nce([[1.0]] * N, [[1.0]] * N, 1.0, labels=labels)


@pytest.mark.parametrize("function", ["nt_xent_loss", "ranking_loss", "siglip_loss", "clip_loss"])
def test_pairs_have_one_shape(function: str) -> None:
    case = FUNCTIONS[function]
    t = inputs(case)
    given = {"weights": t["weights"]}
    with pytest.raises(
        ValueError, match=r"must have one shape \(N, D\), got \(5, 4\) and \(4, 4\)"
    ):
        call(case, loss, {**t, "y": t["y"][:4]}, **given)


def test_teachers() -> None:
    case = FUNCTIONS["distill_loss"]._replace(more_keys=0)
    t = inputs(case)
    for change, pattern in (
        ({"teacher_x": t["teacher_x"][:4]}, r"targets: x' must have 5 rows.*\(4, 2\)"),
        (
            {"teacher_y": t["teacher_y"][:, :1]},
            r"x' and y' must have one width.*\(5, 2\).*\(5, 1\)",
        ),
    ):
        with pytest.raises(ValueError, match=pattern):
            call(case, loss, {**t, **change})


@pytest.mark.parametrize("fused", [clip_loss, siglip_loss])
def test_live_pairs_exclude_the_options_of_lines(fused: Any) -> None:
    x = torch.ones(N, 4, device=DEVICE)
    for options in ({"ids": IDS.to(DEVICE)}, {"weights": torch.ones(N, device=DEVICE)}):
        with pytest.raises(ValueError, match=r"live must be None with ids.*got live=\(0, 2\)"):
            fused(x, x, 1.0, live=(0, 2), **options)


GLOBAL = {
    "data_size": (ValueError, r"data_size must be a number of samples >= 1, got 0", (0,), {}),
    "a bool": (ValueError, r"data_size must be.*got True", (True,), {}),
    "gamma": (ValueError, r"gamma must be in \(0, 1\], got 0", (5,), {"gamma": 0}),
    "a large gamma": (ValueError, r"gamma must be in \(0, 1\], got 1.5", (5,), {"gamma": 1.5}),
    "eps": (ValueError, r"eps must be finite and within \[0.0, inf\), got -1", (5,), {"eps": -1}),
    "rho": (TypeError, r"rho must be a number, got str", (5,), {"rho": "6"}),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_wrong_options_of_the_global_loss(name: str) -> None:
    error, pattern, arguments, options = GLOBAL[name]
    with pytest.raises(error, match=pattern):
        GlobalClipLoss(*arguments, **options)


def test_wrong_indices_of_the_global_loss() -> None:
    x, module = torch.ones(N, 4), GlobalClipLoss(7)
    for indices, error, pattern in (
        (IDS + 3, ValueError, r"0 <= index < 7, got 3 to 7"),
        (IDS - 1, ValueError, r"0 <= index < 7, got -1 to 3"),
        (IDS[:3], ValueError, r"indices must have.*\(5,\), got \(3,\)"),
        (IDS * 1.0, TypeError, r"indices must be integers, got torch.float32"),
        ([0] * N, TypeError, r"indices must be a torch.Tensor, got list"),
    ):
        with pytest.raises(error, match=pattern):
            module(x, x, 1.0, indices)
    assert module.log_u_images.eq(-torch.inf).all()
