"""Environment variables that change which engine runs, how fast, or with which result."""

from __future__ import annotations

import os

PREFIXES = ("FASTCLIP_", "TRITON_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "PYTORCH_",
            "TORCH_", "TORCHINDUCTOR_", "NCCL_")  # fmt: skip
NAMES = ("ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING",
         "CUDA_VISIBLE_DEVICES", "CXX", "LD_LIBRARY_PATH", "LD_PRELOAD", "NVIDIA_TF32_OVERRIDE",
         "RANK", "WORLD_SIZE")  # fmt: skip


def variables() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(PREFIXES) or name in NAMES
    }
