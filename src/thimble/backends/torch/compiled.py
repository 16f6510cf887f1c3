"""numba's `njit`, with a cache on disk where there is room for one and none where there is not."""

import contextlib
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.extending import overload


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a loop to be compiled by `numba.njit` when first called, and loaded from the cache in later processes.

    The cache lies beside the source, in the user's own cache folder or in NUMBA_CACHE_DIR. Where none of them can be
    written, or what lies there is damaged, the loop is compiled anew in each process: nothing else depends on it.
    """

    def decorate(loop: Callable[..., Any]) -> Callable[..., Any]:
        try:
            dispatcher = njit(cache=True, **options)(loop)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return njit(**options)(loop)
        _tolerate(dispatcher._cache)
        return dispatcher

    return decorate


def address_of(loop: Any, *arguments: Any) -> int:
    """Compile a loop for some types of arguments, as a function of C; returns where that is, while the loop lives."""
    loop.compile(arguments)
    found = loop.overloads[arguments]
    return int(found.library.get_pointer_to_function(found.fndesc.llvm_cfunc_wrapper_name))


def specialised(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that compiled loops call: compiled for each value of the constants that it is given."""

    @overload(function, prefer_literal=True, strict=False, jit_options={"error_model": "numpy"})
    def specialise(*arguments: Any) -> Callable[..., Any]:
        return function

    return function


def _tolerate(cache: Any) -> None:
    """Have a cache that cannot be read or written cost time only."""
    save, load = cache.save_overload, cache.load_overload

    def save_overload(signature: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            save(signature, data)

    def load_overload(signature: Any, context: Any) -> Any:
        try:
            return load(signature, context)
        except Exception:  # whatever a damaged pickle raises
            return None

    cache.save_overload, cache.load_overload = save_overload, load_overload
