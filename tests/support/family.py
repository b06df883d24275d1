"""The family of losses by name: the fused function, its dense twin, and random arguments.

A case is a loss with its options. Its tensors come from one batch of features: whatever an option
takes (ids, labels, biases of keys, weights, a teacher) is drawn from a generator of its own.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from support.hard_inputs import batch
from support.judge import Precision, name_of
from support.oracle import rounded
from torch import Tensor

Arrays = dict[str, NDArray]
# The inputs that have gradients.
LEAVES = ("x", "y", "scale", "bias", "key_bias", "weights")


class Case(NamedTuple):
    """A loss, its options, and the names of the tensors that it takes as options."""

    loss: str
    options: dict[str, Any] = {}  # noqa: RUF012 -- never changed
    given: tuple[str, ...] = ()  # of ids, labels, key_bias, weights
    more_keys: int = 0  # N - M

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of the inputs with gradients, in order."""
        inputs = {
            "supcon_loss": ("x", "scale"), "ranking_loss": ("x", "y"),
            "clip_loss": ("x", "y", "scale", "bias"), "siglip_loss": ("x", "y", "scale", "bias"),
        }.get(self.loss, ("x", "y", "scale"))  # fmt: skip
        return inputs + tuple(name for name in LEAVES if name in self.given)

    @property
    def has_ties(self) -> bool:
        """True if the loss takes one of several equal pairs."""
        return bool(self.options.get("hardest"))

    def option(self, name: str, default: Any = None) -> Any:
        return self.options.get(name, default)


CASES = {
    "info_nce": Case("info_nce"),
    "both ways": Case("info_nce", {"symmetric": True, "offset": 2}, ("weights",), 5),
    "queue": Case("info_nce", {}, ("key_bias",), 9),
    "margin": Case("info_nce", {"margin": 0.2, "symmetric": True}, ("weights",)),
    "margin, decoupled": Case("info_nce", {"margin": 0.1, "decoupled": True}),
    "smoothing": Case("info_nce", {"label_smoothing": 0.2, "symmetric": True}, ("ids",)),
    "decoupled": Case("info_nce", {"decoupled": True, "symmetric": True}),
    "hardness": Case("info_nce", {"hardness": 2.0, "symmetric": True}, ("key_bias",)),
    "labels": Case("info_nce", {}, ("labels", "ids", "weights"), 3),
    "false negatives": Case("info_nce", {"false_negative_margin": 0.05, "symmetric": True}),
    "positives by id": Case(
        "info_nce", {"same_id": "positive", "margin": 0.1, "symmetric": True}, ("ids", "weights")
    ),
    "positives by id alone": Case(
        "info_nce", {"same_id": "positive", "offset": None, "label_smoothing": 0.1},
        ("ids", "key_bias", "weights"), 4,
    ),
    "positives by id, decoupled": Case(
        "info_nce", {"same_id": "positive", "decoupled": True}, ("ids",)
    ),
    "supcon": Case("supcon_loss"),
    "supcon, decoupled": Case("supcon_loss", {"decoupled": True}, ("weights",)),
    "nt_xent": Case("nt_xent_loss"),
    "nt_xent, decoupled": Case("nt_xent_loss", {"decoupled": True}, ("weights",)),
    "ranking": Case("ranking_loss", {"margin": 0.3}, ("ids", "weights")),
    "ranking, rows": Case("ranking_loss", {"symmetric": False}),
    "hardest": Case("ranking_loss", {"margin": 0.3, "hardest": True}, ("ids", "weights")),
    "hardest, rows": Case("ranking_loss", {"hardest": True, "symmetric": False}),
    "distill": Case("distill_loss", {}, ("weights",)),
    "distill, rows": Case("distill_loss", {"symmetric": False}, (), 6),
    "clip, ids": Case("clip_loss", {"label_smoothing": 0.1}, ("ids", "weights")),
    "clip, positives": Case("clip_loss", {"same_id": "positive"}, ("ids",)),
    "siglip, ids": Case("siglip_loss", {}, ("ids",)),
    "siglip, positives": Case("siglip_loss", {"same_id": "positive"}, ("ids", "weights")),
}  # fmt: skip


def arrays(
    case: Case, x: NDArray, y: NDArray, scale: float, bias: float = -3.0, seed: int = 0
) -> Arrays:
    """Returns everything that the case may take, for features x, y (M, D)."""
    m, n = len(x), len(x) + case.more_keys
    rng = np.random.default_rng([seed, m])
    if case.more_keys:
        # Further keys are hard: near others, in a random order.
        more = np.resize(y, (n, y.shape[1]))[m:]
        y = np.concatenate([y, (more[rng.permutation(len(more))] + 0.3 * more).astype(np.float32)])
    labels = rng.integers(0, n, m)
    y_ids = rng.integers(0, max(2, m // 3), n) * (1 << 40) - 5
    x_ids = y_ids[labels] if "labels" in case.given else y_ids[rng.permutation(n)[:m]]
    key_bias = rng.normal(size=n)
    if case.more_keys:
        key_bias[-1] = -np.inf  # no row's own key
    width = max(2, x.shape[1] // 2)
    return {
        "x": x, "y": y, "scale": np.asarray(scale), "bias": np.asarray(bias), "labels": labels,
        "x_ids": x_ids, "y_ids": y_ids, "classes": rng.integers(0, max(2, m // 3), m),
        "key_bias": key_bias, "weights": rng.uniform(0.1, 1.1, m),
        "teacher_x": rng.normal(size=(m, width)), "teacher_y": rng.normal(size=(n, width)),
    }  # fmt: skip


def of_batch(case: Case, name: str, n: int, d: int, scale: float = 14.3) -> Arrays:
    """Returns the arrays of a case for one of the hard batches."""
    return arrays(case, *batch(name, n, d), scale)


TEACHER_SCALE = 3.0
INTEGERS = ("labels", "x_ids", "y_ids", "classes")
FEATURES = ("x", "y", "teacher_x", "teacher_y")


def as_rounded(given: Arrays, p: Precision) -> Arrays:
    """Returns the arrays in float64, with the values that tensors of this precision hold."""

    def of(name: str) -> NDArray:
        if name in INTEGERS:
            return given[name]
        if name not in FEATURES:
            return rounded(given[name], name_of(p.scalars))
        own = rounded(given[name], name_of(p.y if name.endswith("y") else p.x))
        return rounded(own, name_of(p.autocast)) if p.autocast else own

    return {name: of(name) for name in given}


def tensors(case: Case, given: Arrays, p: Precision, device: torch.device) -> dict[str, Tensor]:
    """Returns the arrays as tensors; those with gradients are leaves."""

    def of(name: str, value: ArrayLike) -> Tensor:
        if name in INTEGERS:
            return torch.tensor(value, device=device)
        dtype = p.scalars
        if name in FEATURES:
            dtype = p.y if name.endswith("y") else p.x
        t = torch.tensor(value, dtype=torch.float64).to(device, dtype)
        return t.requires_grad_(name in case.leaves)

    return {name: of(name, value) for name, value in given.items()}


def given_options(case: Case, t: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the case's options, tensors among them."""
    found = dict(case.options)
    for name in case.given:
        found[name] = (t["x_ids"], t["y_ids"]) if name == "ids" else t[name]
    return found


def call(case: Case, module: ModuleType | Any, t: dict[str, Tensor], **options: Any) -> Tensor:
    """Calls the case's function of a module: `fastclip.loss`, `reference` or `distributed`."""
    function = getattr(module, case.loss)
    options = given_options(case, t) | options
    if case.loss == "supcon_loss":
        return function(t["x"], t["classes"], t["scale"], **options)
    if case.loss == "ranking_loss":
        return function(t["x"], t["y"], **options)
    if case.loss == "distill_loss":
        teacher = t["teacher_x"], t["teacher_y"], TEACHER_SCALE
        return function(t["x"], t["y"], t["scale"], *teacher, **options)
    bias = (t["bias"],) if "bias" in case.leaves else ()
    return function(t["x"], t["y"], t["scale"], *bias, **options)


def evaluate(
    case: Case, module: ModuleType | Any, given: Arrays, p: Precision, device: torch.device,
    upstream: ArrayLike = 1.0, **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Returns the loss and its gradients: "loss", and "d" with the name of each leaf."""
    t = tensors(case, given, p, device)
    with p.context(device):
        value = call(case, module, t, **options)
    g = torch.as_tensor(np.asarray(upstream, np.float64)).to(value).expand(value.shape)
    wanted = [t[name] for name in case.leaves]
    found = torch.autograd.grad(value, wanted, g, allow_unused=True)
    gradients = {
        f"d{name}": torch.zeros_like(leaf) if d is None else d
        for name, leaf, d in zip(case.leaves, wanted, found, strict=True)
    }
    return {"loss": value.detach(), **gradients}
