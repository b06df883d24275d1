"""Ways to multiply fp32 features besides IEEE products: as bf16 parts, and in tf32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..methods import registry
from . import cases


@contextlib.contextmanager
def split() -> Iterator[None]:
    """Sets FASTCLIP_FP32=split. The library caches the variable; the cache is cleared before and
    after."""
    from fastclip.engine import arithmetic

    before = os.environ.get("FASTCLIP_FP32")
    os.environ["FASTCLIP_FP32"] = "split"
    arithmetic.fp32.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTCLIP_FP32"]
        else:
            os.environ["FASTCLIP_FP32"] = before
        arithmetic.fp32.cache_clear()


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Sets "tf32" or "ieee" for fp32 products, those of plain PyTorch included."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, name
    try:
        yield
    finally:
        settings.fp32_precision = before


def add_method() -> None:
    """Registers the method SPLIT: the Triton engine with fp32 features as bf16 parts."""
    own = registry.METHODS["fastclip triton"]
    text = f"{own.text}, fp32 as bf16 parts"
    registry.METHODS[cases.SPLIT] = replace(own, name=cases.SPLIT, text=text, within=split)
