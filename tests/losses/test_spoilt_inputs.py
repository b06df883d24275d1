"""A NaN, an infinity or an absurd scale shows in the result, and no engine hangs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SPOILT = """
import json, math, sys
import torch
from support.losses import LOSSES, REFERENCES

dtypes = [torch.float64, torch.float32, torch.bfloat16]
engine, device = sys.argv[1:]
results = []
for loss in LOSSES:
    for dtype in dtypes:
        for n in (3, 150):
            for name, value, scale in [
                ("nan", math.nan, 2.0), ("inf", math.inf, 2.0), ("-inf", -math.inf, 2.0),
                ("nan scale", None, math.nan), ("inf scale", None, math.inf),
                ("scale 1e30", None, 1e30), ("scale -1e30", None, -1e30),
                ("scale 1e8", None, 1e8), ("scale 1e300", None, 1e300),
            ]:
                for normalize in (False, True):
                    torch.manual_seed(0)
                    x, y = torch.randn(2, n, 6, dtype=torch.float64).unbind()
                    if value is not None:
                        x[1, 2] = value
                    x, y = (t.to(device, dtype).requires_grad_() for t in (x, y))
                    s = torch.tensor(scale, dtype=torch.float64, device=device, requires_grad=True)
                    arguments = (x, y, s, -1.0)
                    loss_value = LOSSES[loss](*arguments, normalize=normalize, backend=engine)
                    loss_value.backward()
                    wide = (x.detach().double(), y.detach().double(), s.detach(), -1.0)
                    with torch.no_grad():
                        truth = REFERENCES[loss](*wide, normalize=normalize)
                    finite = [bool(t.grad.isfinite().all()) for t in (x, y, s)]
                    results.append(dict(
                        case=f"{loss}, {dtype}, {n} pairs, {name}, {normalize=}",
                        spoilt=name, loss=loss_value.item(), truth=truth.item(), finite=finite,
                    ))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def spoilt(device: torch.device) -> dict[str, list[dict]]:
    """Returns an empty cache of `outcomes`: lists of results by engine."""
    return {}


def outcomes(engine: str, device: torch.device, cache: dict[str, list[dict]]) -> list[dict]:
    """Returns the results of all spoilt batches, from a process of its own, as it might hang."""
    if engine not in cache:
        command = [sys.executable, "-c", SPOILT, engine, str(device)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        cache[engine] = json.loads(done.stdout)
    return cache[engine]


def test_spoilt_features_show_in_loss_and_gradients(
    engine: str, device: torch.device, spoilt: dict[str, list[dict]]
) -> None:
    """A NaN reaches the results, and after an infinity a GradScaler sees gradients not finite."""
    cases = [c for c in outcomes(engine, device, spoilt) if c["spoilt"] in ("nan", "inf", "-inf")]
    assert cases
    for case in cases:
        if case["spoilt"] == "nan":
            assert math.isnan(case["loss"]), case
        if not math.isfinite(case["truth"]):
            # A pair whose positive logit is infinite may have a loss of zero.
            assert not all(case["finite"]), case


def test_absurd_scales_give_the_true_loss_or_nan(
    engine: str, device: torch.device, spoilt: dict[str, list[dict]]
) -> None:
    """A finite result is right even if logits are too large for their differences to be exact."""
    cases = [c for c in outcomes(engine, device, spoilt) if "scale" in c["spoilt"]]
    assert cases
    for case in cases:
        if math.isfinite(case["loss"]):
            assert case["loss"] == pytest.approx(case["truth"], rel=1e-2), case
