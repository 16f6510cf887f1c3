"""Other forward passes for modules, for a while."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def running(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within this, modules run other forward passes than their own, or than those that were given them before."""
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in forwards:
            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in reversed(replaced):
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


def unchanged(x: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a module whose work is done elsewhere: what comes in goes out."""
    return x
