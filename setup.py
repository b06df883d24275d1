"""Builds `fastclip._C`, the compiled engines, against the torch that is installed.

The extension is optional: where torch or a C++ compiler is missing, or the compiler fails, the
package installs without it and its plain PyTorch engine serves. Nothing here asks what hardware
this machine has: every capability of the architecture is compiled, the choice falls at run time.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

# FASTCLIP_REQUIRE_EXTENSION=1: a missing extension is an error, so that nobody tests the fallback
# unawares. FASTCLIP_SKIP_EXTENSION=1: leave it out, for a pure Python wheel in a second.
REQUIRED = os.environ.get("FASTCLIP_REQUIRE_EXTENSION", "0") == "1"
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


def compiler_version() -> str:
    """First line of the C++ compiler's `--version`; raises where there is none."""
    # CXX as distutils reads it: the compiler, perhaps behind a launcher such as ccache.
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return version.stdout.partition("\n")[0]


def install_without(reason: object) -> None:
    """Tell why there is no extension, or stop where one is required."""
    failure = f"the compiled engines were not built: {reason}"
    if REQUIRED:
        sys.exit(f"fastclip: FASTCLIP_REQUIRE_EXTENSION=1, but {failure}")
    print(
        f"\nfastclip: {failure}\n"
        "fastclip: installing without them; the pure PyTorch engine serves: same results, slower\n",
        file=sys.stderr,
        flush=True,
    )


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
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
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
            def compile_engine(capability: str) -> list[str]:
                return self.compiler.compile(
                    ["csrc/engine_cpu.cpp"],
                    output_dir=str(Path(self.build_temp) / capability.lower()),
                    macros=[*extension.define_macros, ("FASTCLIP_CAPABILITY", capability)],
                    include_dirs=extension.include_dirs,
                    extra_postargs=[*extension.extra_compile_args, *CAPABILITIES[capability]],
                    depends=extension.depends,
                )

            # Without ninja torch's compile() is not made for threads.
            with ThreadPoolExecutor(os.cpu_count() if self.use_ninja else 1) as pool:
                for objects in pool.map(compile_engine, CAPABILITIES):
                    extension.extra_objects += objects
            super().build_extension(extension)

    extension = CppExtension(
        "fastclip._C",
        # The CUDA engine joins here, by a switch of its own: asked for, never by finding a GPU.
        sources=["csrc/module.cpp", "csrc/ops.cpp"],
        depends=["csrc/engine_cpu.cpp", *map(str, sorted(Path("csrc").glob("*.h")))],
        define_macros=[
            ("FASTCLIP_X86", str(int(IS_X86))),
            ("FASTCLIP_TORCH_VERSION", f'"{torch.__version__}"'),
            ("FASTCLIP_COMPILER", f'"{version}"'),
        ],
        extra_compile_args=CFLAGS,
        extra_link_args=LDFLAGS,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildEngines}}


setup(
    # Here and not in pyproject.toml, because no spelling there suits every version of setuptools.
    license="Apache-2.0",
    # The folder triton_kernels/ is only ever fastclip.triton_kernels: the bare name belongs to a
    # package of the Triton project, which other libraries look for.
    packages=[*find_packages(include=["fastclip", "fastclip.*"]), "fastclip.triton_kernels"],
    package_dir={"fastclip": "fastclip", "fastclip.triton_kernels": "triton_kernels"},
    package_data={"fastclip": ["py.typed", "**/*.png", "**/*.json", "**/LICENSE*", "**/*.txt"]},
    **extension_arguments(),
)
