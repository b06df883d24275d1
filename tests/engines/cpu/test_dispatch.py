"""Every instruction set and both matrix products are used as requested, and give right results.

ATEN_CPU_CAPABILITY is read once per process, so each combination runs in its own process.
FASTCLIP_CPU is read at each call, so a process may change it between the sweeps.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastclip
from fastclip.loss import clip_loss

pytestmark = pytest.mark.skipif(
    fastclip.backends()["cpu"] != "available", reason="the C++ engine was not built"
)

INFO = fastclip.build_info() or {}
CAPABILITIES = ("default", "avx2", "avx512")
# The largest instruction set of this machine, which may lack the later ones.
MACHINE = torch.backends.cpu.get_cpu_capability()
AVAILABLE = CAPABILITIES[: 1 + CAPABILITIES.index(MACHINE.lower())] if INFO else ()
PRODUCTS = ("brgemm", "mm")

EXAMINE = """
import json
import numpy as np
import torch
from support.hard_inputs import batch
from support.judge import PRECISIONS, QUANTITIES, allowance, error, evaluate, truth
import fastclip
from fastclip.loss import clip_loss, siglip_loss

cpu = torch.device("cpu")
failures, examined = [], 0
for name, loss in {"clip": clip_loss, "siglip": siglip_loss}.items():
    for precision in ("float64", "float32", "bfloat16", "float16"):
        # One shift and running maxima; several strips and tiles; odd D; products in pieces.
        for batch_name, scale, n, d in (
            ("random", 14.3, 131, 7), ("dominating", 100.0, 97, 35), ("separated", 14.3, 90, 131),
            ("lengths", 14.3, 97, 33), ("long_duplicates", 1e4, 131, 24),
        ):
            normalize = batch_name == "lengths"
            case = (*batch(batch_name, n, d), scale, -3.0, PRECISIONS[precision])
            exact = truth(name, *case, normalize=normalize)
            for budget in (0, None):
                results = evaluate(
                    loss, *case, cpu, normalize=normalize, memory_budget=budget, backend="cpu"
                )
                for quantity in QUANTITIES:
                    result = results[quantity]
                    allowed = 4 * allowance(
                        quantity, exact, PRECISIONS[precision], result.dtype
                    )
                    mistake = error(result, np.asarray(getattr(exact, quantity)))
                    examined += 1
                    if not mistake <= allowed + 1e-15:
                        failures.append(
                            f"{name} {precision} {batch_name} {budget} {quantity}: {mistake:.2e}, "
                            f"allowed {allowed:.2e}"
                        )
print(json.dumps({"info": fastclip.build_info(), "failures": failures, "examined": examined}))
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Scripts find `support` through the working directory, which PYTHONSAFEPATH would exclude.
    settings = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONSAFEPATH": "", **environment}
    return subprocess.run(
        [sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=False,
        timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.fixture(scope="module")
def examinations() -> dict[tuple[str, str], subprocess.CompletedProcess[str]]:
    combinations = [(capability, product) for capability in AVAILABLE for product in PRODUCTS]
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(
            lambda c: run(EXAMINE, ATEN_CPU_CAPABILITY=c[0], FASTCLIP_CPU=c[1]), combinations
        )
        return dict(zip(combinations, done, strict=True))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_combination_is_used_and_right(
    capability: str,
    product: str,
    examinations: dict[tuple[str, str], subprocess.CompletedProcess[str]],
) -> None:
    if capability not in AVAILABLE:
        pytest.skip(f"this machine has no {capability}")
    if product == "brgemm" and INFO["product"] != "brgemm":
        pytest.skip("this machine has no brgemm")
    done = examinations[capability, product]
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    info = report["info"]
    assert info["capability"] == capability.upper()
    assert info["product"] == product
    # Only brgemm takes operands in half precision.
    assert info["bf16_products"] == (INFO["bf16_products"] and product == "brgemm")
    assert info["threads"] == 2
    assert report["examined"] == 2 * 4 * 5 * 2 * 5
    assert not report["failures"], "\n".join(report["failures"])


STATE_BUILD = "import fastclip, json; print(json.dumps(fastclip.build_info()))"
STATE_LOSS = """
import torch
from fastclip.loss import clip_loss
print(clip_loss(torch.eye(3), torch.eye(3), 1.0).item())
"""


@pytest.mark.parametrize("script", [STATE_BUILD, STATE_LOSS], ids=["build_info", "loss"])
def test_an_unknown_product_is_one_error(script: str) -> None:
    done = run(script, FASTCLIP_CPU="nonsense")
    last = done.stderr.strip().splitlines()
    assert done.returncode == 1
    errors = [line for line in last if line.startswith("ValueError")]
    assert errors == ["ValueError: FASTCLIP_CPU must be 'brgemm' or 'mm', got 'nonsense'"]
    assert not done.stdout


def test_an_empty_setting_means_the_default() -> None:
    done = run(STATE_BUILD, FASTCLIP_CPU="")
    assert done.returncode == 0, done.stderr
    unset = {k: v for k, v in INFO.items() if k not in ("threads", "product", "bf16_products")}
    found = json.loads(done.stdout)
    assert {k: found[k] for k in unset} == unset


ONEDNN_OFF = """
import torch, fastclip
from fastclip.loss import clip_loss
torch.backends.mkldnn.enabled = False
print(clip_loss(torch.eye(3), torch.eye(3), 1.0).item())
"""


@pytest.mark.skipif(INFO.get("product") != "brgemm", reason="this machine has no brgemm")
def test_missing_brgemm_is_an_error_only_if_it_was_requested() -> None:
    forced = run(ONEDNN_OFF, FASTCLIP_CPU="brgemm")
    assert forced.returncode == 1
    assert "RuntimeError: FASTCLIP_CPU=brgemm, but this machine has no AVX-512" in forced.stderr
    free = run(ONEDNN_OFF, FASTCLIP_CPU="")
    assert free.returncode == 0, free.stderr
    assert float(free.stdout) == pytest.approx(clip_loss(torch.eye(3), torch.eye(3), 1.0).item())


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
def test_switching_onednn_off_takes_effect_at_once() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert fastclip.build_info()["product"] == "mm"
    assert fastclip.build_info()["product"] == INFO["product"]
