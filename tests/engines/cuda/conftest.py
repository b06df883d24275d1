"""The build script as a module."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def setup() -> SimpleNamespace:
    """Returns the definitions of setup.py, which installs nothing when it runs as a module."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of a mock nvcc 12.8, set as CUDA_HOME; other settings are unset."""
    for name in ("FASTCLIP_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libcudart_static.a").touch()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "--version) echo 'Cuda compilation tools, release 12.8, V12.8.93' ;;\n"
        "--list-gpu-code) echo sm_75; echo sm_80; echo sm_90 ;;\n"
        f"""--dryrun*) echo '#$ LIBRARIES=  "-L{tmp_path}/stubs" "-L{tmp_path}/lib"' >&2 ;;\n"""
        # The first word of the source decides whether its compilation succeeds.
        '*) if grep -q "^fine" "$LAST_SOURCE"; then echo object > "$OBJECT"; echo "a warning" >&2\n'
        '   else seq -f "note %g" 100; echo "error: broken" >&2; exit 1; fi ;;\n'
        "esac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return tmp_path
