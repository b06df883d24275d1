"""Faults of a rank in a soak: each changes one rank's call, and says what the ranks must do.

- "equal": all results equal one process's.
- "nan": results have NaN wherever the dense loss of one process has it.
- "refused": every rank raises TypeError or ValueError.
- "broken": every rank that lives raises RuntimeError within the timeout of the group.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from soak.drawn import pick
from soak.spread import CPU, Results, Spread, backward, forward, leaves
from support import family
from torch import Tensor

from fastclip import reference

Change = Callable[[Spread, Results, dict[str, Any]], None]
ASLEEP = 3600.0


class Fault(NamedTuple):
    """expected: as above. share: of the cases. change: alters the rank's tensors and options."""

    expected: str
    share: float
    change: Change | None = None
    between: bool = False  # it happens between forward and backward
    applies: Callable[[Spread], bool] = lambda spread: True


def _other_option(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    """A different value of an option that ranks must share."""
    options["normalize"] = not spread.normalize


def _other_loss(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    others = {"margin": 0.37} if spread.case.loss in ("info_nce", "ranking_loss") else None
    if others is None and spread.case.loss != "siglip_loss":
        others = {"reduction": "sum" if spread.reduction != "sum" else "mean"}
    options |= others or {"reduction": "sum" if spread.reduction != "sum" else "mean"}


def _other_exchange(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    options["ring"] = not spread.ring


def _other_dtype(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    now = t["x"].dtype
    t["x"] = _leaf(t["x"], torch.float32 if now == torch.float64 else torch.float64)


def _other_width(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    for name in ("x", "y"):
        t[name] = _leaf(torch.cat((t[name], t[name][:, :1]), 1), t[name].dtype)


def _other_size(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    for name, value in t.items():
        if value.dim() > 0:
            t[name] = _leaf(torch.cat((value, value[:1])), value.dtype, value.requires_grad)


def _integers(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    t["x"] = torch.ones(t["x"].shape, dtype=torch.int64)


def _list(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    t["x"] = t["x"].tolist()


def _unknown_reduction(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    options["reduction"] = "median"


def _unknown_backend(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    options["backend"] = "gpu"


def _negative_budget(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    options["memory_budget"] = -1


def _vector_of_features(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    t["x"] = t["x"].flatten()


def _wrong_weights(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    options["weights"] = torch.ones(len(t["x"]) + 1)


def _frozen(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    for name, value in t.items():
        t[name] = value.detach()


def _nan(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    x = t["x"].detach().clone()
    x[-1:, 0] = torch.nan
    t["x"] = x.requires_grad_()


def _stall(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    time.sleep(ASLEEP)


def _die(spread: Spread, t: Results, options: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _leaf(t: Tensor, dtype: torch.dtype, wanted: bool = True) -> Tensor:
    return t.detach().to(dtype).requires_grad_(wanted)


def _is_exchanged(spread: Spread) -> bool:
    # The search for the hardest negatives gathers the batch, with `ring` or without.
    return not spread.case.option("hardest")


def _takes_weights(spread: Spread) -> bool:
    return "weights" not in spread.case.given


FAULTS = {
    "none": Fault("equal", 0.5),
    "NaN": Fault("nan", 0.06, _nan),
    "another normalize": Fault("refused", 0.03, _other_option),
    "another option of the loss": Fault("refused", 0.04, _other_loss),
    "another exchange": Fault("refused", 0.03, _other_exchange, applies=_is_exchanged),
    "another dtype": Fault("refused", 0.04, _other_dtype),
    "another width": Fault("refused", 0.03, _other_width),
    "another size": Fault("refused", 0.03, _other_size, applies=lambda s: not s.uneven),
    "features that are integers": Fault("refused", 0.02, _integers),
    "features that are a list": Fault("refused", 0.02, _list),
    "features that are a vector": Fault("refused", 0.02, _vector_of_features),
    "an unknown reduction": Fault("refused", 0.02, _unknown_reduction),
    "an unknown backend": Fault("refused", 0.02, _unknown_backend),
    "a negative budget": Fault("refused", 0.02, _negative_budget),
    "weights of another size": Fault("refused", 0.02, _wrong_weights, applies=_takes_weights),
    "nothing to differentiate": Fault("refused", 0.03, _frozen),
    "stalls before the forward": Fault("broken", 0.0175, _stall),
    "stalls before the backward": Fault("broken", 0.0175, _stall, between=True),
    "dies before the forward": Fault("broken", 0.0175, _die),
    "dies before the backward": Fault("broken", 0.0175, _die, between=True),
}


# A rank alone has nothing to misfit, and nobody waits for it.
OF_SEVERAL_RANKS = ("another", "nothing", "stalls", "dies")


def choose(rng: Any, spread: Spread) -> tuple[str, int]:
    """Returns a fault that can happen to the loss, and the rank that has it."""
    alone = len(spread.sizes) == 1
    names = [
        name for name, fault in FAULTS.items()
        if fault.applies(spread) and not (alone and name.startswith(OF_SEVERAL_RANKS))
    ]  # fmt: skip
    shares = [FAULTS[name].share for name in names]
    name = names[rng.choice(len(names), p=[share / sum(shares) for share in shares])]
    having = [k for k, n in enumerate(spread.sizes) if n] if name == "NaN" else spread.sizes
    rank = pick(rng, having) if name == "NaN" else int(rng.integers(len(having)))
    return name, rank


def step(rank: int, group: Any, spread: Spread, name: str, faulty: int) -> Results:
    """This rank's value and gradients; the rank `faulty` has the fault."""
    torch.set_num_threads(spread.threads[rank])
    t, options = leaves(spread, spread.own_arrays(rank)), {}
    fault = FAULTS[name]
    if rank == faulty and fault.change and not fault.between:
        fault.change(spread, t, options)
    value = forward(spread, rank, t, group, **options)
    if rank == faulty and fault.change and fault.between:
        fault.change(spread, t, options)
    return backward(spread, rank, t, value)


def of_one_process(spread: Spread, faulty: int | None) -> Results:
    """The dense loss of the whole batch; rank `faulty` has brought NaN."""
    given = spread.arrays()
    t = leaves(spread, given)
    if faulty is not None:
        x = t["x"].detach().clone()
        x[spread.part(faulty).stop - 1, 0] = torch.nan
        t["x"] = x.requires_grad_()
    with spread.p.context(CPU):
        value = family.call(
            spread.case, reference, t, normalize=spread.normalize, reduction=spread.reduction
        )
    wanted = [k for k in spread.case.leaves if t[k].requires_grad]
    g = torch.as_tensor(spread.upstream()).to(value).expand(value.shape)
    found = torch.autograd.grad(value, [t[k] for k in wanted], g, allow_unused=True)
    gradients = {
        f"d{k}": torch.zeros_like(t[k]) if d is None else d
        for k, d in zip(wanted, found, strict=True)
    }
    return {"loss": value.detach(), **gradients}
