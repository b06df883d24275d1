"""The compiled module: importing it registers the operators of the C++ engines."""

from typing import Any

def build_info() -> dict[str, Any]:
    """Returns compiler, torch, instruction sets, matrix product, threads and the CUDA build."""

def threads_used() -> int:
    """Returns the number of threads that took part in the last operator on CPU tensors."""

def release_workspace() -> None:
    """Frees the buffers that are kept for the next step."""

def gemm_rate(dtype: str, m: int = 64, n: int = 128, k: int = 512, seconds: float = 0.5) -> float:
    """Returns GFLOP/s of the CPU engine's product in cache, summed over all threads."""
