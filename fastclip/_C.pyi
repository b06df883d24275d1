"""The compiled module: importing it registers the operators of the C++ engines."""

from typing import Any

def build_info() -> dict[str, Any]:
    """Compiler, torch, instruction sets, matrix product, threads, and the CUDA engine's build."""

def threads_used() -> int:
    """The number of threads that took part in the last operator on CPU tensors."""

def release_workspace() -> None:
    """Frees the buffers that wait for the next step."""

def gemm_rate(dtype: str, m: int = 64, n: int = 128, k: int = 512, seconds: float = 0.5) -> float:
    """GFLOP/s of the CPU engine's product on operands that stay in cache, all threads together."""
