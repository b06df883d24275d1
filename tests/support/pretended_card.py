"""A pretended card, with or without Triton and a CUDA engine, for tests of `fastclip.backends`."""

import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

backends = importlib.import_module("fastclip.engine.backends")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
COMPILED_KINDS = frozenset(("softmax", "sigmoid", "hinge"))
ALL_CARDS = ("sm_80", "sm_90", "sm_100", "compute_120")


@contextmanager
def nothing_known() -> Iterator[pytest.MonkeyPatch]:
    """Clears cached availability and settings; the interpreter is off."""
    caches = (backends._warn_of_fallback, backends._capability)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_AVAILABILITY", {})
        patch.setattr(backends, "interpreted", lambda: False)
        patch.delenv("FASTCLIP_GPU", raising=False)
        for cache in caches:
            cache.cache_clear()
        yield patch
    for cache in caches:
        cache.cache_clear()


def pretend(
    patch: pytest.MonkeyPatch,
    capability: tuple[int, int] = (9, 0),
    triton: str | None = "3.7.1",
    starts: Callable[[], object] = object,
    compiled_for: Sequence[str] = (),
) -> None:
    """Pretends that there is a card; that Triton, if any, has this version, and that its driver
    starts by calling `starts`; that the CUDA engine, if any, was compiled for these
    architectures."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    target = types.SimpleNamespace(get_current_target=starts)
    runtime = types.SimpleNamespace(driver=types.SimpleNamespace(active=target))
    fake = types.SimpleNamespace(__version__=triton, runtime=runtime) if triton else None
    patch.setitem(sys.modules, "triton", fake)
    # The module that lists the Triton engine's kinds cannot import a pretended Triton.
    kinds = types.SimpleNamespace(KINDS=COMPILED_KINDS)
    patch.setitem(sys.modules, "fastclip.triton_kernels.kinds", kinds)
    patch.setattr(backends, "_COMPILED_KINDS", COMPILED_KINDS)
    cuda = {"version": "13.0", "architectures": list(compiled_for)} if compiled_for else False
    info = {"cuda": cuda, "why_no_cuda": "there is no nvcc on PATH"}
    patch.setattr(backends, "_MODULE", types.SimpleNamespace(build_info=lambda: info))
