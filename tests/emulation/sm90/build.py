"""Compiles the fused kernels as a build does, and the programs that test them without a card."""

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FOLDER = ROOT / "build" / "cuda_fused"
UNITS = ("cuda/sm90/sweep.cu", "cuda/sm90/weigh.cu")
NVCC_FLAGS = ["-std=c++17", "-O3", "--ftz=true", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# csrc/cuda/sm90/gemm.h explains NDEBUG. Without --prec-div=false a division is a function call.
NVCC_FLAGS += ["-DNDEBUG", "--prec-div=false", "--expt-relaxed-constexpr"]
NVCC_FLAGS += ["-gencode", "arch=compute_90a,code=sm_90a", "--resource-usage"]


def cutlass_include() -> Path | None:
    """Returns CUTLASS's headers, from the checkout $CUTLASS_PATH or the package nvidia-cutlass."""
    folders = []
    if checkout := os.environ.get("CUTLASS_PATH"):
        folders.append(Path(checkout) / "include")
    # The package is not imported, since only its data files are needed.
    if spec := importlib.util.find_spec("cutlass_library"):
        for place in spec.submodule_search_locations or []:
            folders.append(Path(place) / "source" / "include")
    return next((f for f in folders if (f / "cutlass" / "cutlass.h").exists()), None)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)


def cuobjdump() -> str | None:
    """Returns the toolkit's cuobjdump, or Triton's."""
    beside = [str(Path(found).resolve().parent / "cuobjdump")] if (found := nvcc()) else []
    if spec := importlib.util.find_spec("triton"):
        for place in spec.submodule_search_locations or []:
            beside.append(str(Path(place) / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next(filter(None, map(shutil.which, [*beside, "cuobjdump"])), None)


def why_not() -> str | None:
    if nvcc() is None:
        return "no nvcc"
    if cutlass_include() is None:
        return "no CUTLASS headers: pip install --no-deps nvidia-cutlass==4.2.0.0"
    if shutil.which("g++") is None:
        return "no g++"
    return None


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-5000:]}"
    return done.stdout + done.stderr


def made(name: str, command: list[str], sources: list[Path]) -> tuple[Path, str]:
    """Returns the output file of a command, which ends in -o, and its messages.

    The command runs only if it or a source has changed.
    """
    digest = hashlib.sha256(shlex.join(command).encode())
    for path in sources:
        digest.update(path.read_bytes())
    target = FOLDER / f"{digest.hexdigest()[:16]}-{name}"
    log = target.with_name(f"{target.name}.log")
    if not log.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        log.write_text(run([*command, str(target)]))
    return target, log.read_text()


def unit(name: str) -> tuple[Path, str]:
    """Returns a unit's object and ptxas's report. To compile one takes a minute and 3.3 GB."""
    source = ROOT / "csrc" / name
    include = ["-I", str(cutlass_include())]
    command = [str(nvcc()), *NVCC_FLAGS, *include, "-c", str(source), "-o"]
    return made(f"{source.stem}.o", command, [source, *sorted((ROOT / "csrc").rglob("*.h"))])


def cuda_include() -> list[str]:
    told = run([str(nvcc()), "--dryrun", "-x", "cu", "-c", os.devnull])
    folders = re.findall(r"^#\$ (?:SYSTEM_)?INCLUDES=(.*)$", told, re.MULTILINE)
    words = shlex.split(" ".join(folders))
    return [word.removeprefix("-I") for word in words if word != "-isystem"]


def program(name: str, flags: list[str], extra: list[Path], also: list[Path]) -> Path:
    source = HERE / f"{name}.cpp"
    system = [flag for f in [str(cutlass_include()), *cuda_include()] for flag in ("-isystem", f)]
    command = ["g++", "-std=c++17", "-Wall", *flags, "-I", str(ROOT / "csrc"), *system]
    command += [str(source), *map(str, also), "-o"]
    headers = [*HERE.glob("*.h"), *(ROOT / "csrc").rglob("*.h"), *extra]
    return made(name, command, sorted({source, *headers, *also}))[0]


def launcher() -> Path:
    """Builds the host side of both units with a mock of the CUDA runtime."""
    objects = [unit(name)[0] for name in UNITS]
    return program("launch", ["-O1"], [], [HERE / "mock.cpp", *objects])


def emulator() -> Path:
    """Builds the program that runs both epilogues on the CPU."""
    context = HERE.parent / "cuda/context.h"
    return program("emulate", ["-O1", "-DNDEBUG", "-Wno-unknown-pragmas"], [context], [])


def emulated_kernels() -> Path:
    """Builds a library of both kernels for the emulated engine."""
    context = HERE.parent / "cuda/context.h"
    flags = ["-O1", "-DNDEBUG", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-fvisibility=hidden"]
    return program("kernels", flags, [context], [])


class Kernel(NamedTuple):
    name: str
    instructions: list[str]

    def count(self, prefix: str) -> int:
        return sum(i.startswith(prefix) for i in self.instructions)


def kernels(target: Path) -> list[Kernel]:
    text = run([str(cuobjdump()), "-sass", str(target)])
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)")
    return [
        Kernel(part.split(maxsplit=1)[0], instruction.findall(part))
        for part in text.split("Function : ")[1:]
    ]
