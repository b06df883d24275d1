"""The built extension under AddressSanitizer and UndefinedBehaviorSanitizer: the operators and the
engine on every instruction set, with every matrix product, in Python."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.sanitized import build

CALLS = 150
TESTS = Path(__file__).resolve().parents[2]
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
MACHINE = torch.backends.cpu.get_cpu_capability()
AVAILABLE = CAPABILITIES[: 1 + CAPABILITIES.index(MACHINE)] if MACHINE in CAPABILITIES else ()

pytestmark = [
    pytest.mark.minutes,
    pytest.mark.sanitize,
    pytest.mark.skipif(platform.system() != "Linux", reason="LD_PRELOAD is Linux's"),
]


@pytest.fixture(scope="module")
def package() -> Path:
    if not Path(build.runtime("libasan.so")).is_absolute():
        pytest.skip("the compiler has no shared AddressSanitizer")
    return build.package()


def run(package: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (package, TESTS)))
    settings = {
        **os.environ, "PYTHONPATH": path, "LD_PRELOAD": build.preloaded(),
        # Python frees little of what it allocates, and torch allocates beside malloc.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1", **variables,
    }  # fmt: skip
    # -c and -m look for modules here first, whatever an installation has put on the path.
    return subprocess.run(
        [sys.executable, *arguments], env=settings, cwd=package, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip


@pytest.mark.parametrize("product", ["brgemm", "mm"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_is_found(package: Path, capability: str, product: str) -> None:
    if capability not in AVAILABLE:
        pytest.skip(f"this machine has no {capability}")
    if product == "brgemm" and "AVX512" not in AVAILABLE:
        pytest.skip("this machine has no brgemm")
    done = run(
        package, "-m", "support.sanitized.exercise", str(CALLS), "0",
        ATEN_CPU_CAPABILITY=capability.lower(), FASTCLIP_CPU=product,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert done.stdout == f"0 wrong, {capability}, {product}, sanitized\n"


def test_the_extension_is_the_sanitized_one(package: Path) -> None:
    done = run(package, "-c", "import fastclip._C as c; print(c.build_info()['compiler'])")
    assert done.stdout == "sanitized\n", done.stderr
    library = next((package / "fastclip").glob("_C*.so")).read_bytes()
    for report in (b"__asan_report_load", b"__asan_poison_memory_region", b"__ubsan_handle_"):
        assert report in library


@pytest.mark.parametrize(
    "mistake, report",
    [("overrun(8)", "heap-buffer-overflow"), ("overflow(1)", "signed integer overflow")],
)
def test_a_mistake_is_seen(package: Path, mistake: str, report: str) -> None:
    code = f"import ctypes, torch; ctypes.CDLL({str(build.mistakes())!r}).{mistake}"
    done = run(package, "-c", code)
    assert done.returncode != 0 and report in done.stderr, done.stderr[-5000:]
