"""Installs fastclip into the running Python: built here, or from a bundle of `make gpu-bundle`.

The Python may belong to the system; pip then needs PIP_BREAK_SYSTEM_PACKAGES. The CUDA engine is
compiled only for the machine's card, in a sixth of the time for all cards. If that fails, nvcc's
message is printed and the run continues without that engine. A bundle's peers are installed in a
folder of their own, on PYTHONPATH, not among the system's packages.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import tarfile
from pathlib import Path

import torch

from . import process
from .bundle import contents
from .steps import FAILED, PASSED, Outcome, Session

INSTALL = [sys.executable, "-m", "pip", "--quiet", "install", "--no-build-isolation", "--no-deps"]
EDITABLE = [*INSTALL, "--editable", "."]
PEERS = process.ROOT / "build" / "gpu-peers"
ENGINES = """
import sys, fastclip
for name, availability in fastclip.backends().items():
    print(f"engine {name}: {availability}")
print(fastclip.build_info())
sys.exit(fastclip.backends()["cpu"] != "available")
"""


def install(session: Session, seconds: float) -> Outcome:
    """The step. Sets the environment of later commands in the session."""
    began = session.clock()
    ends = began + seconds
    session.environment["PIP_BREAK_SYSTEM_PACKAGES"] = "1"
    taken = take(session, ends) if session.bundle else None
    note, failures = "from the bundle", ()
    if not taken:
        note, failures = build(session, ends)
    code = _run(session, ends, [sys.executable, "-c", ENGINES]).code
    status = PASSED if code == 0 and not failures else FAILED
    return Outcome("install", status, session.clock() - began, note, failures)


def _run(session: Session, ends: float, command: list[str], **more: str) -> process.Ended:
    left = max(1.0, ends - session.clock())
    return process.run(command, left, session.say, {**session.environment, **more})


def build(session: Session, ends: float) -> tuple[str, tuple[str, ...]]:
    """Builds and installs fastclip; returns a note on what was built, and the failures."""
    more = {"FASTCLIP_REQUIRE_EXTENSION": "0", "FASTCLIP_CUDA": "0"}
    if session.device == "cuda" and torch.version.cuda:
        card = "{}.{}".format(*torch.cuda.get_device_capability())
        cards = os.environ.get("TORCH_CUDA_ARCH_LIST", card)
        asked = {"FASTCLIP_CUDA": "1", "TORCH_CUDA_ARCH_LIST": cards}
        if _run(session, ends, EDITABLE, **(more | asked)).code == 0:
            return "built with the CUDA engine", ()
        failure = "FAILED: the CUDA engine was not built; nvcc's message stands above"
        session.say(f"{failure}; going on without it")
        if _run(session, ends, EDITABLE, **more).code == 0:
            return "built without the CUDA engine", (failure,)
        return "not built", (failure, "FAILED: pip install")
    if _run(session, ends, EDITABLE, **more).code == 0:
        return "built", ()
    return "not built", ("FAILED: pip install",)


# ---- from a bundle -----------------------------------------------------------------------------


def take(session: Session, ends: float) -> bool:
    """Installs the parts of the bundle that fit and prints why others do not; True if its extension
    runs here."""
    bundle = session.bundle
    try:
        told = json.loads((bundle / contents.DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        session.say(f"bundle: {contents.DESCRIPTION} cannot be read: {error}; building")
        return False
    known = told if isinstance(told, dict) else {}
    if absent := [name for name in contents.KEYS if not isinstance(known.get(name), str)]:
        names = ", ".join(absent)
        session.say(f"bundle: {contents.DESCRIPTION} lacks {names}: it does not fit; building")
        return False
    take_cache(session, bundle, told)
    take_peers(session, bundle, ends)
    return take_extension(session, bundle, told, ends)


def take_cache(session: Session, bundle: Path, told: dict[str, str]) -> None:
    """Unpacks Triton's cache to the path that it was made for: Triton finds code only there.

    Every user may write to the parent folder, and the code in the cache is executed: a folder of
    another user is therefore not used.
    """
    folder = Path(told["triton_cache"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            raise PermissionError(f"{folder} is not owned by this user")
        with tarfile.open(bundle / contents.CACHE) as archive:
            archive.extractall(folder, filter="data")
    except (OSError, tarfile.TarError) as error:
        session.say(f"bundle: no warm Triton cache: {error}")
        return
    session.environment["TRITON_CACHE_DIR"] = str(folder)
    session.say(f"bundle: Triton's cache in {folder}")


def take_peers(session: Session, bundle: Path, ends: float) -> None:
    wheels = sorted(map(str, (bundle / contents.WHEELS).glob("*.whl")))
    if not wheels:
        session.say("bundle: no wheels of peers")
        return
    shutil.rmtree(PEERS, ignore_errors=True)
    offline = ["--no-index", "--no-compile", "--target", str(PEERS)]
    if _run(session, ends, [*INSTALL, *offline, *wheels]).code:
        session.say("bundle: its wheels do not install here")
    paths = [str(PEERS), os.environ.get("PYTHONPATH", "")]
    session.environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)


def take_extension(session: Session, bundle: Path, told: dict[str, str], ends: float) -> bool:
    suffix, digest = sysconfig.get_config_var("EXT_SUFFIX"), contents.digest_of_sources()
    found = bundle / f"_C{suffix}"
    reason = None
    if not found.exists():
        reason = f"it has no _C{suffix}"
    elif told["torch"].partition("+")[0] != torch.__version__.partition("+")[0]:
        reason = f"it was built against torch {told['torch']}, here is {torch.__version__}"
    elif told["sources"] != digest:
        reason = "it was built from other sources"
    if reason is None:
        target = process.ROOT / "fastclip" / found.name
        shutil.copyfile(found, target)
        skipping = {"FASTCLIP_SKIP_EXTENSION": "1", "FASTCLIP_REQUIRE_EXTENSION": "0"}
        done = _run(session, ends, EDITABLE, **skipping)
        works = "import sys, fastclip; sys.exit(fastclip.backends()['cpu'] != 'available')"
        if done.code == 0 and _run(session, ends, [sys.executable, "-c", works]).code == 0:
            return True
        target.unlink(missing_ok=True)
        reason = "it does not load here"
    session.say(f"bundle: not its extension: {reason}; building")
    return False
