"""The place of the Triton engine's kernels, installed as `fastclip.triton_kernels`.

The kernels are not here yet. What is here is the guard: a package of the Triton project has the
bare name `triton_kernels`, and libraries that probe for it must not find this folder instead when
the source root is on `sys.path`. Importing this package imports no Triton and touches no device.
"""

if __name__ != "fastclip.triton_kernels":
    raise ImportError(
        f"fastclip's kernels are fastclip.triton_kernels, not {__name__!r}: "
        "the folder that holds fastclip's sources is on sys.path"
    )
