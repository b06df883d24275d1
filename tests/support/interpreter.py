"""Changes to Triton's interpreter: it is faster, and old versions run with NumPy 2.4."""

import functools
import inspect
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter


@functools.cache  # conftest.py is imported more than once
def hasten() -> None:
    """Saves a third of the time of the interpreted engine's tests.

    The interpreter searches Triton's language for builtins at every call of a function from a
    kernel. The search is cached here, but builtins are replaced as often as before: a launch in
    another thread may have given them back.
    """

    @functools.cache
    def builtins_of(package: Any) -> list[str]:
        members = inspect.getmembers(package)
        return [name for name, member in members if tl.core.is_builtin(member)]

    def replace_in(package: Any, builder: object, scope: Any) -> None:
        for name in builtins_of(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    # Searched before any launch: launches in two threads would see each other's replacements.
    for package in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base):
        builtins_of(package)
    interpreter._patch_builtin = replace_in
    interpreter._get_np_dtype = _cached(interpreter._get_np_dtype)


def _cached(np_dtype: Any) -> Any:
    """Caches a function that makes a dictionary of all dtypes at every call."""
    of_scalar = functools.cache(np_dtype)

    def run(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return np_dtype(scalar) if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    return run


@functools.cache
def mend() -> None:
    """Lets loops run with NumPy 2.4 before Triton 3.7, which represented a scalar as an array of
    shape (1,): `int` no longer accepts one, `item` does."""
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    patch_language = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: Any) -> None:
        patch_language(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
