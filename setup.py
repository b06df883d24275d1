"""Builds `fastclip._C`, the compiled engines, against the torch that is installed.

The extension is optional: where torch or a C++ compiler is missing, or the compiler fails, the
package installs without it and its plain PyTorch engine serves. Nothing here asks what hardware
this machine has: every capability of the architecture is compiled, the choice falls at run time.

The CUDA engine joins where torch is built for CUDA and nvcc has the same major version; else one
line says why not. CUDA_HOME names nvcc's folder; without it PATH is searched, then the places where
torch looks for a toolkit. TORCH_CUDA_ARCH_LIST names the cards to compile for.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import find_packages, setup

# FASTCLIP_REQUIRE_EXTENSION=1: a missing extension is an error, so that nobody tests the fallback
# unawares. FASTCLIP_SKIP_EXTENSION=1: leave it out, for a pure Python wheel in a second.
# FASTCLIP_CUDA=1: so is a missing CUDA engine; 0: leave that out.
REQUIRING = [
    f"{name}=1"
    for name in ("FASTCLIP_REQUIRE_EXTENSION", "FASTCLIP_CUDA")
    if os.environ.get(name) == "1"
]
SKIPPED = os.environ.get("FASTCLIP_SKIP_EXTENSION", "0") == "1"

# No -ffast-math: the losses rely on infinities and on the order of sums. No -march=native: a wheel
# travels. Without -fopenmp at::parallel_for is silently serial. -g0 undoes Python's own -g.
# -ffp-contract=fast: the exponential's accuracy rests on fused multiply-adds.
CFLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall"]
CFLAGS += ["-ffp-contract=fast"]
LDFLAGS = ["-fopenmp", *(["-Wl,-s"] if sys.platform == "linux" else [])]

# engine_cpu.cpp is compiled once for each of these. From the least to the greatest, which is also
# the order of linking: of an inline function that several objects hold the linker keeps the first,
# so no code outside the AVX-512 engine can come to run AVX-512 instructions.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512 += ["-mprefer-vector-width=512"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
CAPABILITIES = {"DEFAULT": [], **({"AVX2": AVX2, "AVX512": AVX512} if IS_X86 else {})}


class CudaSource(NamedTuple):
    """Compiled by nvcc, without torch's headers."""

    path: str
    flags: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()  # instead of those that are asked for


ENGINE = CudaSource("csrc/cuda/engine.cu")
# Tensor-core kernels for one card, by CUTLASS: a minute and 3.3 GB each. NDEBUG: see
# csrc/cuda/sm90/gemm.h. A division to IEEE's letter is a function call.
FUSED_FLAGS = ("-DNDEBUG", "--prec-div=false", "--expt-relaxed-constexpr")
FUSED = [
    CudaSource("csrc/cuda/sm90/sweep.cu", FUSED_FLAGS, ("sm_90a",)),
    CudaSource("csrc/cuda/sm90/weigh.cu", FUSED_FLAGS, ("sm_90a",)),
]
NVCC_FLAGS = ["-std=c++17", "-O3", "--ftz=true", "--threads", "0"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Those that nvcc knows. Code for sm_80 runs on 8.7, too, code for sm_100 on 10.3; the last one's
# PTX on whatever comes later.
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
# The runtime goes in statically, as it does in cuBLAS and NCCL: a shared one would have to be
# torch's, and where nvcc's release is later than that one's, the library asks it for symbols that
# it lacks and takes the CPU engine with it. Copies of the runtime share the driver's contexts.
CUDA_LIBRARIES = ["cudart_static", "rt", "pthread", "dl"]


def compiler_version() -> str:
    """First line of the C++ compiler's `--version`; raises where there is none."""
    # CXX as distutils reads it: the compiler, perhaps behind a launcher such as ccache.
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return version.stdout.partition("\n")[0]


def install_without(reason: object) -> None:
    """Tell why there is no extension, or stop where one is required."""
    failure = f"the compiled engines were not built: {reason}"
    if REQUIRING:
        sys.exit(f"fastclip: {REQUIRING[0]}, but {failure}")
    print(
        f"\nfastclip: {failure}\n"
        "fastclip: installing without them; the pure PyTorch engine serves: same results, slower\n",
        file=sys.stderr,
        flush=True,
    )


class NoCuda(Exception):
    """Why the CUDA engine cannot be built, in a line; and nvcc's output, where it said more."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output.strip()

    def explained(self) -> str:
        """The reason above the end of the output: pip may show no line but those of the error."""
        lines = self.output.splitlines()
        if len(lines) > LAST_LINES:
            lines[:-LAST_LINES] = [f"[{len(lines) - LAST_LINES} lines before these]"]
        return "\n  ".join([str(self), *lines])


LAST_LINES = 40  # of nvcc's output in an error


class Toolkit(NamedTuple):
    """An nvcc, and what it is asked to compile for: sm_90 is code for a card, compute_90 PTX."""

    nvcc: str
    version: str
    library_dirs: list[str]
    architectures: list[str]


def cuda_architectures(asked: str, known: Collection[str]) -> list[str]:
    """What TORCH_CUDA_ARCH_LIST asks for, if anything; known: what nvcc compiles for."""
    if not asked.strip():
        served = [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known]
        if not served:
            raise NoCuda(f"this nvcc compiles for none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}")
        return [*(f"sm_{number}" for number in served), f"compute_{served[-1]}"]
    found = []
    for name in re.split(r"[;,\s]+", asked.strip(" ;,")):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if parts is None:
            rule = "TORCH_CUDA_ARCH_LIST must be numbers such as '8.0;9.0a;12.0+PTX'"
            raise NoCuda(f"{rule}, got {name!r}")
        major, minor, suffix, with_ptx = parts.groups()
        if int(major) < 8:  # the engine needs more, other packages in the same environment less
            continue
        if f"sm_{major}{minor}" not in known:
            raise NoCuda(f"TORCH_CUDA_ARCH_LIST has {name}, which this nvcc does not compile for")
        found += [f"sm_{major}{minor}{suffix}"]
        found += [f"compute_{major}{minor}{suffix}"] if with_ptx else []
    if not found:
        raise NoCuda(f"TORCH_CUDA_ARCH_LIST must have a card of 8.0 or later, got {asked!r}")
    return list(dict.fromkeys(found))


def find_nvcc() -> str:
    """Of CUDA_HOME where that is set; else on PATH, else where torch finds a toolkit."""
    if home := os.environ.get("CUDA_HOME"):
        nvcc, searched = nvcc_in(home), f"under CUDA_HOME={home}"
    else:
        from torch.utils.cpp_extension import CUDA_HOME as usual  # such as /usr/local/cuda

        nvcc = shutil.which("nvcc") or (nvcc_in(usual) if usual else None)
        searched = f"on PATH{f' or under {usual}' if usual else ''}, and CUDA_HOME is not set"
    if nvcc is None:
        raise NoCuda(f"there is no nvcc {searched}")
    return nvcc


def nvcc_in(home: str) -> str | None:
    return shutil.which("nvcc", path=str(Path(home) / "bin"))


def find_toolkit(torch_version: str, torch_cuda: str | None) -> Toolkit:
    """The nvcc that goes with torch; raises NoCuda."""
    asked = os.environ.get("FASTCLIP_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"fastclip: FASTCLIP_CUDA must be 0 or 1, got {asked!r}")
    if asked == "0":
        raise NoCuda("FASTCLIP_CUDA=0 left it out")
    if torch_cuda is None:
        raise NoCuda(f"torch {torch_version} is not built for CUDA")
    nvcc = find_nvcc()

    def ask(*arguments: str) -> str:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
        output = done.stdout + done.stderr
        if done.returncode:
            raise NoCuda(f"{shlex.join([nvcc, *arguments])} fails", output)
        return output

    told = re.search(r"release (\d+\.\d+)", ask("--version"))
    version = told[1] if told else "unknown"
    if version.partition(".")[0] != torch_cuda.partition(".")[0]:
        raise NoCuda(f"torch {torch_version} is built for CUDA {torch_cuda}, nvcc is {version}")
    cards = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    architectures = cuda_architectures(cards, ask("--list-gpu-code").split())
    # A dry run names the folders that nvcc itself would link from, wherever it is installed.
    libraries = re.search(r"LIBRARIES=(.*)", ask("--dryrun", "-x", "cu", "-c", os.devnull))
    folders = [flag[2:] for flag in shlex.split(libraries[1] if libraries else "")]
    if not any((Path(folder) / "libcudart_static.a").exists() for folder in folders):
        raise NoCuda(f"nvcc {version} comes without libcudart_static.a")
    return Toolkit(nvcc, version, folders, architectures)


def cutlass_headers() -> Path | None:
    """Of a checkout, $CUTLASS_PATH, or of the package nvidia-cutlass."""
    sources = [Path(os.environ["CUTLASS_PATH"])] if os.environ.get("CUTLASS_PATH") else []
    if spec := importlib.util.find_spec("cutlass_library"):  # not imported: it is a generator
        sources += [Path(place) / "source" for place in spec.submodule_search_locations or ()]
    headers = (source / "include" for source in sources)
    return next((path for path in headers if (path / "cutlass/cutlass.h").exists()), None)


def cuda_sources(architectures: Collection[str]) -> list[CudaSource]:
    """The engine, and the fused kernels where CUTLASS is found and their card is asked for."""
    cutlass = cutlass_headers()
    if cutlass is None or not {"sm_90", "sm_90a"} & set(architectures):
        return [ENGINE]
    include = ("-I", str(cutlass))
    fused = [source._replace(flags=(*source.flags, *include)) for source in FUSED]
    return [ENGINE._replace(flags=("-DFASTCLIP_FUSED=1",)), *fused]


def compile_cuda(toolkit: Toolkit, source: CudaSource, folder: Path) -> str:
    """An object; the earlier one, if neither command nor sources have changed since."""
    target = folder / f"{Path(source.path).stem}.o"
    command = [toolkit.nvcc, *NVCC_FLAGS, *source.flags, "-c", source.path, "-o", str(target)]
    for code in source.architectures or toolkit.architectures:
        command += ["-gencode", f"arch={code.replace('sm', 'compute')},code={code}"]
    digest = hashlib.sha256(repr((toolkit.version, command)).encode())
    for path in [Path(source.path), *sorted(Path("csrc").rglob("*.h"))]:
        digest.update(path.read_bytes())
    stamp = target.with_suffix(".sha256")
    if not (target.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest()):
        folder.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        if done.returncode:
            raise NoCuda(f"nvcc {toolkit.version} fails at {source.path}", done.stdout)
        sys.stderr.write(done.stdout)  # its warnings
        stamp.write_text(digest.hexdigest())
    return str(target)


def add_cuda(extension: Any, toolkit: Toolkit, objects: list[str]) -> None:
    architectures = ",".join(map(json.dumps, toolkit.architectures))
    extension.define_macros.append(("FASTCLIP_CUDA_VERSION", json.dumps(toolkit.version)))
    extension.define_macros.append(("FASTCLIP_CUDA_ARCHITECTURES", architectures))
    extension.sources.append("csrc/cuda/ops.cpp")
    extension.extra_objects += objects
    # Of torch_cuda only the current stream is asked.
    extension.libraries += ["torch_cuda", *CUDA_LIBRARIES]
    extension.library_dirs += toolkit.library_dirs


def leave_out_cuda(extension: Any, reason: NoCuda) -> None:
    """Tell why there is no CUDA engine, or stop where FASTCLIP_CUDA=1 asks for one."""
    if os.environ.get("FASTCLIP_CUDA") == "1":
        sys.exit(f"fastclip: FASTCLIP_CUDA=1, but {reason.explained()}")
    print(f"fastclip: no CUDA engine: {reason.explained()}", file=sys.stderr, flush=True)
    extension.define_macros.append(("FASTCLIP_WHY_NO_CUDA", json.dumps(str(reason))))


def extension_arguments() -> dict[str, Any]:
    """Arguments of `setup` that build the extension; none where there is nothing to build with."""
    if SKIPPED:
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension

        version = compiler_version()
    except ImportError as error:
        install_without(f"they need torch in the environment that builds: {error}")
        return {}
    except (OSError, subprocess.SubprocessError) as error:
        install_without(f"no working C++ compiler (CXX names one): {error}")
        return {}

    class BuildEngines(BuildExtension):
        """Adds the engine's objects, one per capability; a failing compiler is no failure."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # An editable install would build in a new temporary folder each time; in a fixed one
            # ninja recompiles only what changed. It knows headers and flags, so it is always asked.
            # One for each torch: two that took turns would recompile everything each time.
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{torch.__version__}"
            self.build_temp = str(Path("build") / f"objects-{tag}")
            self.force = True

        def run(self) -> None:
            inplace = self.inplace  # an editable install; run() forgets it when it fails
            try:
                super().run()
            except Exception as error:  # whatever compiler, linker and ninja may raise
                install_without(error)
                # An earlier build's library must not pass for this one.
                self.inplace = inplace
                Path(self.get_ext_fullpath("fastclip._C")).unlink(missing_ok=True)
                self.extensions.clear()

        def build_extension(self, extension: CppExtension) -> None:
            macros = list(extension.define_macros)

            def compile_engine(capability: str) -> list[str]:
                return self.compiler.compile(
                    ["csrc/cpu/engine.cpp"],
                    output_dir=str(Path(self.build_temp) / capability.lower()),
                    macros=[*macros, ("FASTCLIP_CAPABILITY", capability)],
                    include_dirs=extension.include_dirs,
                    extra_postargs=[*extension.extra_compile_args, *CAPABILITIES[capability]],
                    depends=extension.depends,
                )

            toolkit, sources = None, []
            try:  # first: what stops the build should do so before minutes of compiling
                toolkit = find_toolkit(torch.__version__, torch.version.cuda)
                sources = cuda_sources(toolkit.architectures)
            except NoCuda as reason:
                leave_out_cuda(extension, reason)
            folder = Path(self.build_temp) / "cuda"
            # Without ninja torch's compile() is not made for threads.
            with ThreadPoolExecutor(os.cpu_count() if self.use_ninja else 1) as pool:
                compiled = pool.map(lambda source: compile_cuda(toolkit, source, folder), sources)
                for objects in pool.map(compile_engine, CAPABILITIES):
                    extension.extra_objects += objects
            if toolkit:
                try:
                    add_cuda(extension, toolkit, list(compiled))
                except NoCuda as reason:
                    leave_out_cuda(extension, reason)
            super().build_extension(extension)

    extension = CppExtension(
        "fastclip._C",
        sources=["csrc/module.cpp", "csrc/cpu/ops.cpp"],
        depends=["csrc/cpu/engine.cpp", *map(str, sorted(Path("csrc").rglob("*.h")))],
        define_macros=[
            ("FASTCLIP_X86", str(int(IS_X86))),
            ("FASTCLIP_TORCH_VERSION", f'"{torch.__version__}"'),
            ("FASTCLIP_COMPILER", f'"{version}"'),
        ],
        extra_compile_args=CFLAGS,
        extra_link_args=LDFLAGS,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildEngines}}


if __name__ == "__main__":
    setup(
        # Here and not in pyproject.toml, since no spelling there suits every version of setuptools.
        license="Apache-2.0",
        # The folder triton_kernels/ is only ever fastclip.triton_kernels: the bare name belongs to
        # a package of the Triton project, which other libraries look for.
        packages=[
            *find_packages(include=["fastclip", "fastclip.*"]),
            *(f"fastclip.{name}" for name in find_packages(include=["triton_kernels*"])),
        ],
        package_dir={"fastclip": "fastclip", "fastclip.triton_kernels": "triton_kernels"},
        package_data={"fastclip": ["py.typed", "**/*.png", "**/*.json", "**/LICENSE*", "**/*.txt"]},
        **extension_arguments(),
    )
