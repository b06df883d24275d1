"""Builds `fastclip._C`, the compiled engines, against the installed torch.

The extension is optional. Without torch or a working C++ compiler the package installs without it,
and the plain PyTorch engine serves. Every instruction set of the architecture is compiled, even if
this machine lacks it, since the engine chooses one at run time.

The CUDA engine is built if torch is built for CUDA and nvcc has the same major version; otherwise
a printed line says why. `csrc/cuda/toolkit.py` finds nvcc and the cards to compile for.

pip shows nothing of a build that succeeds. The reason for a missing extension is therefore
installed, too, and the warning at the first loss has it.
"""

import hashlib
import importlib
import importlib.util
import json
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import setuptools
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

# Run rather than imported: the root is not on the path of a build, and no bytecode goes to csrc.
TOOLKIT = runpy.run_path(str(Path(__file__).with_name("csrc") / "cuda/toolkit.py"))
NoCuda, Toolkit, find_toolkit = TOOLKIT["NoCuda"], TOOLKIT["Toolkit"], TOOLKIT["find_toolkit"]
find_nvcc, cuda_architectures = TOOLKIT["find_nvcc"], TOOLKIT["cuda_architectures"]

# FASTCLIP_REQUIRE_EXTENSION=1 makes a missing extension an error, so that no test uses the fallback
# by mistake; FASTCLIP_SKIP_EXTENSION=1 leaves it out, for a pure Python wheel in a second.
# FASTCLIP_CUDA=1 makes a missing CUDA engine an error; FASTCLIP_CUDA=0 leaves it out.
REQUIRED = ("FASTCLIP_REQUIRE_EXTENSION", "FASTCLIP_CUDA")
REQUIRING = [f"{name}=1" for name in REQUIRED if os.environ.get(name) == "1"]
SKIPPED = os.environ.get("FASTCLIP_SKIP_EXTENSION", "0") == "1"

# There is no -ffast-math, since the losses rely on infinities and on the order of sums, and no
# -march=native, since wheels run on other machines. Without -fopenmp at::parallel_for is silently
# serial. -g0 undoes Python's own -g. The exponential's accuracy needs fused multiply-adds
# (-ffp-contract=fast).
CFLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall"]
CFLAGS += ["-ffp-contract=fast"]
LDFLAGS = ["-fopenmp", *(["-Wl,-s"] if sys.platform == "linux" else [])]

UNITS = ("csrc/module.cpp", "csrc/cpu/ops.cpp", "csrc/cpu/retrieval_ops.cpp")
# These are compiled once for each instruction set, and linked in this order, from the smallest set
# to the largest. The linker keeps the first copy of an inline function, so no code outside the
# AVX-512 engine can contain AVX-512 instructions.
DISPATCHED = ("csrc/cpu/engine.cpp", "csrc/cpu/retrieval.cpp")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512 += ["-mprefer-vector-width=512"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
CAPABILITIES = {"DEFAULT": [], **({"AVX2": AVX2, "AVX512": AVX512} if IS_X86 else {})}


class CudaSource(NamedTuple):
    """A source that nvcc compiles, without torch's headers."""

    path: str
    flags: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()  # in place of the requested ones


ENGINE = CudaSource("csrc/cuda/engine.cu")
# CUTLASS's tensor-core kernels take a minute and 3.3 GB each to compile. csrc/cuda/sm90/gemm.h
# explains NDEBUG. Without --prec-div=false a division would be a function call.
FUSED_FLAGS = ("-DNDEBUG", "--prec-div=false", "--expt-relaxed-constexpr")
FUSED = [
    CudaSource(f"csrc/cuda/sm90/{name}.cu", FUSED_FLAGS, ("sm_90a",)) for name in ("sweep", "weigh")
]
NVCC_FLAGS = ["-std=c++17", "-O3", "--ftz=true", "--threads", "0"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
# The runtime is linked statically, as in cuBLAS and NCCL: a library built by a newer nvcc may need
# symbols that torch's own runtime lacks. Copies of the runtime share the driver's contexts.
CUDA_LIBRARIES = ["cudart_static", "rt", "pthread", "dl"]


def compiler_version() -> str:
    """Returns the first line of `$CXX --version`; CXX may begin with a launcher such as ccache."""
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return version.stdout.partition("\n")[0]


def borrow_torch() -> None:
    """Makes the torch of the environment that pip installs into importable in pip's isolated build.

    pip runs an isolated build with the environment's own interpreter and hides its packages by
    PYTHONPATH, which -E ignores. So this torch is the one that will run the extension. Its path is
    appended: the build's own packages come first. Front ends that isolate with an interpreter of
    their own, such as uv and `python -m build`, have no torch to borrow.
    """
    ask = (
        "import importlib.util, sys\n"
        "print(*sys.path if importlib.util.find_spec('torch') else (), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-E", "-c", ask], capture_output=True, text=True)
    sys.path += [path for path in done.stdout.splitlines() if path and path not in sys.path]
    importlib.invalidate_caches()


def install_without(reason: object) -> None:
    """Prints why there is no extension, and lets it be installed; exits if one is required."""
    failure = f"the compiled engines were not built: {reason}"
    if REQUIRING:
        sys.exit(f"fastclip: {REQUIRING[0]}, but {failure}")
    without = "installing without them; the pure PyTorch engine serves: same results, slower"
    print(f"\nfastclip: {failure}\nfastclip: {without}\n", file=sys.stderr, flush=True)
    BuildModules.absence = str(reason).strip().partition("\n")[0]


class BuildModules(build_py):
    """Copies the modules, and the reason for a missing extension to the place of the extension."""

    absence = ""

    def run(self) -> None:
        if self.editable_mode:
            return super().run()
        # An earlier copy may have modules that are gone.
        shutil.rmtree(Path(self.build_lib, "fastclip"), ignore_errors=True)
        super().run()
        if self.absence:
            self.leave_reason()

    def leave_reason(self) -> None:
        Path(self.build_lib, "fastclip", "_C.absent").write_text(f"{self.absence}\n")


# A source distribution is the whole checkout: it can be tested, and built without git.
DISTRIBUTED = ("csrc", "fastclip", "triton_kernels", "tests", "bench", "docs", ".ci", "Makefile",
               "CHANGELOG.md", "CONTRIBUTING.md", ".clang-format", ".gitignore",
               ".requirements.txt", ".requirements-oldest.txt",
               ".requirements-peers.txt")  # fmt: skip


def distributed_files() -> Iterator[str]:
    """Yields the files of a source distribution that setuptools would not find."""
    for name in DISTRIBUTED:
        if os.path.isfile(name):
            yield name
        for folder, folders, files in os.walk(name):  # an installation links triton_kernels
            folders[:] = [folder for folder in folders if folder != "__pycache__"]
            yield from (str(Path(folder, name)) for name in files if not name.endswith(".so"))


class BuildSources(sdist):
    """Makes the source distribution. MANIFEST.in is not needed."""

    def make_distribution(self) -> None:
        self.filelist.extend(distributed_files())
        self.filelist.sort()
        self.filelist.remove_duplicates()
        super().make_distribution()


def cutlass_headers() -> Path | None:
    """Returns the headers of the checkout $CUTLASS_PATH, else of the package nvidia-cutlass."""
    sources = [Path(os.environ["CUTLASS_PATH"])] if os.environ.get("CUTLASS_PATH") else []
    if spec := importlib.util.find_spec("cutlass_library"):  # importing it would run a generator
        sources += [Path(place) / "source" for place in spec.submodule_search_locations or ()]
    headers = (source / "include" for source in sources)
    return next((path for path in headers if (path / "cutlass/cutlass.h").exists()), None)


def cuda_sources(architectures: Collection[str]) -> list[CudaSource]:
    """Returns the engine's source and, if CUTLASS and sm_90 are there, the fused kernels'."""
    cutlass = cutlass_headers()
    if cutlass is None or not {"sm_90", "sm_90a"} & set(architectures):
        return [ENGINE]
    include = ("-I", str(cutlass))
    fused = [source._replace(flags=(*source.flags, *include)) for source in FUSED]
    return [ENGINE._replace(flags=("-DFASTCLIP_FUSED=1",)), *fused]


def compile_cuda(toolkit: Toolkit, source: CudaSource, folder: Path) -> str:
    """Returns the object file, compiled anew only if the command or a source has changed."""
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
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        output = done.stdout + done.stderr
        if done.returncode:
            raise NoCuda(f"nvcc {toolkit.version} fails at {source.path}", output)
        sys.stderr.write(output)  # its warnings
        stamp.write_text(digest.hexdigest())
    return str(target)


def add_cuda(extension: Any, toolkit: Toolkit, objects: list[str]) -> None:
    architectures = ",".join(map(json.dumps, toolkit.architectures))
    extension.define_macros.append(("FASTCLIP_CUDA_VERSION", json.dumps(toolkit.version)))
    extension.define_macros.append(("FASTCLIP_CUDA_ARCHITECTURES", architectures))
    extension.sources.append("csrc/cuda/ops.cpp")
    extension.extra_objects += objects
    # torch_cuda is needed for one function only, which returns the current stream.
    extension.libraries += ["torch_cuda", *CUDA_LIBRARIES]
    extension.library_dirs += toolkit.library_dirs


def leave_out_cuda(extension: Any, reason: NoCuda) -> None:
    """Prints why there is no CUDA engine; exits if FASTCLIP_CUDA=1 requires one."""
    if os.environ.get("FASTCLIP_CUDA") == "1":
        sys.exit(f"fastclip: FASTCLIP_CUDA=1, but {reason.explained}")
    print(f"fastclip: no CUDA engine: {reason.explained}", file=sys.stderr, flush=True)
    extension.define_macros.append(("FASTCLIP_WHY_NO_CUDA", json.dumps(str(reason))))


LICENSE = "license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license"
COMMANDS: dict[str, type] = {"build_py": BuildModules, "sdist": BuildSources}


def extension_arguments() -> dict[str, Any]:
    """Returns the arguments of `setup` that build the extension, or none if it cannot be built."""
    if SKIPPED:
        BuildModules.absence = "FASTCLIP_SKIP_EXTENSION=1 left it out, as in a wheel for any torch"
        return {}
    try:
        if importlib.util.find_spec("torch") is None:
            borrow_torch()
        # ninja is found on PATH only, which lacks the scripts of an environment that is not active.
        os.environ["PATH"] = os.pathsep.join(
            (os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts"))
        )
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
        """Builds the engines. If a compiler fails, the package installs without them."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # torch writes CXX for ninja as one word, and ninja then finds no launcher.
            self.use_ninja = self.use_ninja and len(shlex.split(os.environ.get("CXX", "c++"))) < 2
            # In a fixed folder ninja recompiles only changed files; editable installations would
            # use a new temporary one each time. Each torch has its own folder. ninja always runs:
            # it tracks headers and flags, which setuptools does not.
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{torch.__version__}"
            self.build_temp = str(Path("build") / f"objects-{tag}")
            self.force = True

        def run(self) -> None:
            inplace = self.inplace  # an editable installation; run() resets it when it fails
            try:
                super().run()
            except Exception as error:  # compiler, linker and ninja raise different ones
                install_without(error)
                # An earlier build's library must not pass for this one.
                self.inplace = inplace
                Path(self.get_ext_fullpath("fastclip._C")).unlink(missing_ok=True)
                self.extensions.clear()
                if not inplace:
                    self.get_finalized_command("build_py").leave_reason()

        def build_extension(self, extension: CppExtension) -> None:
            macros = list(extension.define_macros)

            def compile_engine(capability: str) -> list[str]:
                return self.compiler.compile(
                    list(DISPATCHED),
                    output_dir=str(Path(self.build_temp) / capability.lower()),
                    macros=[*macros, ("FASTCLIP_CAPABILITY", capability)],
                    include_dirs=extension.include_dirs,
                    extra_postargs=[*extension.extra_compile_args, *CAPABILITIES[capability]],
                    depends=extension.depends,
                )

            toolkit, sources = None, []
            try:  # first, since it can stop the build before minutes of compiling
                toolkit = find_toolkit(torch.__version__, torch.version.cuda)
                sources = cuda_sources(toolkit.architectures)
            except NoCuda as reason:
                leave_out_cuda(extension, reason)
            folder = Path(self.build_temp) / "cuda"
            # Without ninja torch's compile() is not thread-safe.
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
        sources=list(UNITS),
        depends=[*DISPATCHED, *map(str, sorted(Path("csrc").rglob("*.h")))],
        define_macros=[
            ("FASTCLIP_X86", str(int(IS_X86))),
            ("FASTCLIP_TORCH_VERSION", f'"{torch.__version__}"'),
            ("FASTCLIP_COMPILER", f'"{version}"'),
        ],
        extra_compile_args=CFLAGS,
        extra_link_args=LDFLAGS,
    )
    COMMANDS["build_ext"] = BuildEngines
    return {"ext_modules": [extension]}


if __name__ == "__main__":
    setup(
        # Not in pyproject.toml, since no spelling there suits every version of setuptools.
        **{LICENSE: "Apache-2.0"},
        # The folder triton_kernels/ is installed as fastclip.triton_kernels only: the bare name
        # belongs to a package of the Triton project, which other libraries look for.
        packages=[
            *find_packages(include=["fastclip", "fastclip.*"], exclude=["fastclip.hub_kernel"]),
            *(f"fastclip.{name}" for name in find_packages(include=["triton_kernels*"])),
        ],
        package_dir={"fastclip": "fastclip", "fastclip.triton_kernels": "triton_kernels"},
        # The demo's pictures are left out: they are 6 MB, and the demo finds them in a checkout.
        package_data={"fastclip": ["py.typed", "_C.pyi"]},
        **extension_arguments(),
        cmdclass=COMMANDS,
    )
