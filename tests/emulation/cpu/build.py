"""Builds the CPU engine without torch, with the driver of this folder."""

import platform
from pathlib import Path

import torch
from emulation import programs
from emulation.programs import CSRC, Unit

HERE = Path(__file__).resolve().parent
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# As in setup.py, which compiles cpu/engine.cpp once for each instruction set.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
CAPABILITIES = {"DEFAULT": (), **({"AVX2": AVX2, "AVX512": AVX512} if IS_X86 else {})}
# The program replaces this function of the C library, in which the engine's threads allocate.
LINK = ("-Wl,--wrap=aligned_alloc",)


def build(sanitizer: str = "none", capability: str = "DEFAULT", csrc: Path = CSRC) -> Path:
    """Returns the built program; skips the test if the compiler lacks the sanitizer."""
    # Only the headers of torch's half-precision numbers are read, which need no library.
    system = ("-isystem", str(Path(torch.__file__).parent / "include"))
    flags = (*system, "-ffp-contract=fast", f"-DFASTCLIP_X86={int(IS_X86)}")
    engine = (*flags, *CAPABILITIES[capability], f"-DFASTCLIP_CAPABILITY={capability}")
    units = [
        Unit(csrc / "cpu/engine.cpp", HERE, engine, csrc),
        Unit(HERE / "driver.cpp", HERE, (*flags, f"-DENGINE={capability}"), csrc),
    ]
    return programs.build(units, sanitizer, LINK)
