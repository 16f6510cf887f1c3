"""Reverse-mode differentiation of array programs, as small as it can be: enough for `thimble.models.forward`.

A `Var` is an array that remembers what it was made from, and how its own gradient goes back to each of those (Griewank
and Walther, Evaluating Derivatives, chapter 3). What is made of plain arrays stays a plain array and costs nothing.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.models.forward import Ops

Array = NDArray[np.float64]
Back = Callable[[Array], Array]
_numbers = itertools.count()


class Var:
    """An array on the tape, with what it was made from and how a gradient of it becomes one of each of those."""

    __array_ufunc__ = None  # numpy leaves `array + var` to `Var.__radd__`

    def __init__(self, value: Array, sources: Sequence[tuple["Var", Back]] = ()) -> None:
        self.value, self.sources, self.number = value, sources, next(_numbers)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.value.shape

    @property
    def T(self) -> Any:
        """The transpose of a matrix."""
        return _made(self.value.T, (self, lambda g: g.T))

    def __neg__(self) -> Any:
        return _made(-self.value, (self, lambda g: -g))

    def __add__(self, other: Any) -> Any:
        return _made(self.value + _value(other), (self, _summed(self)), (other, _summed(other)))

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def __rsub__(self, other: Any) -> Any:
        return other + -self

    def __mul__(self, other: Any) -> Any:
        a, b = self.value, _value(other)
        return _made(a * b, (self, _summed(self, lambda g: g * b)), (other, _summed(other, lambda g: g * a)))

    def __truediv__(self, other: Any) -> Any:
        a, b = self.value, _value(other)
        to_other = _summed(other, lambda g: -g * a / (b * b))
        return _made(a / b, (self, _summed(self, lambda g: g / b)), (other, to_other))

    def __matmul__(self, other: Any) -> Any:
        return _product(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return _product(other, self)

    def __getitem__(self, index: Any) -> Any:
        """Part of the array; the index names no element twice."""

        def back(g: Array) -> Array:
            slope = np.zeros(self.shape)
            slope[index] = g
            return slope

        return _made(self.value[index], (self, back))

    def reshape(self, *shape: int) -> Any:
        """The same elements in another shape."""
        return _made(self.value.reshape(*shape), (self, lambda g: g.reshape(self.shape)))

    def swapaxes(self, first: int, second: int) -> Any:
        """Two axes exchanged."""
        return _made(self.value.swapaxes(first, second), (self, lambda g: g.swapaxes(first, second)))

    __radd__, __rmul__ = __add__, __mul__


def gradients(result: Any, leaves: Sequence[Var]) -> list[Array]:
    """The gradients of a scalar at some leaves; a plain number, which depends on nothing, has gradients of zero."""
    slopes = {id(result): np.ones(np.shape(_value(result)))}
    for node in _newest_first(result):
        for source, back in node.sources:
            slope = back(slopes[id(node)])
            slopes[id(source)] = slopes[id(source)] + slope if id(source) in slopes else slope
        if node.sources:
            del slopes[id(node)]
    return [slopes.get(id(leaf), np.zeros(leaf.shape)) for leaf in leaves]


def _newest_first(result: Any) -> list[Var]:
    """All that a result was made from, itself included, what was made later first."""
    found: dict[int, Var] = {}
    waiting = [result] if isinstance(result, Var) else []
    while waiting:
        node = waiting.pop()
        if node.number not in found:
            found[node.number] = node
            waiting += [source for source, _ in node.sources]
    return [found[number] for number in sorted(found, reverse=True)]


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Var) else x


def _made(value: Any, *sources: tuple[Any, Back]) -> Any:
    """An array made from others: on the tape if one of them is."""
    kept = [(source, back) for source, back in sources if isinstance(source, Var)]
    return Var(value, kept) if kept else value


def _summed(source: Any, back: Back = lambda g: g) -> Back:
    """A way back that undoes broadcasting: what was repeated gets the sum."""

    def summed(g: Array) -> Array:
        slope, shape = back(g), source.shape
        if slope.shape != shape:
            slope = slope.sum(tuple(range(slope.ndim - len(shape))))
            slope = slope.sum(tuple(i for i, n in enumerate(shape) if n == 1 < slope.shape[i]), keepdims=True)
        return slope

    return summed


def _product(a: Any, b: Any) -> Any:
    """Matrix product over the last two axes; leading axes agree."""
    left, right = _value(a), _value(b)
    to_a, to_b = (lambda g: g @ right.swapaxes(-1, -2)), (lambda g: left.swapaxes(-1, -2) @ g)
    return _made(left @ right, (a, to_a), (b, to_b))


# ---- the table of operations ----------------------------------------------------------------------------------------


def _exp(x: Any) -> Any:
    y = np.exp(_value(x))
    return _made(y, (x, lambda g: g * y))


def _tanh(x: Any) -> Any:
    y = np.tanh(_value(x))
    return _made(y, (x, lambda g: g * (1 - y * y)))


def _sqrt(x: Any) -> Any:
    y = np.sqrt(_value(x))
    return _made(y, (x, lambda g: g * 0.5 / y))


def _mean(x: Any) -> Any:
    value = _value(x)
    y = value.mean(-1, keepdims=True)
    return _made(y, (x, lambda g: np.broadcast_to(g / value.shape[-1], value.shape)))


def _sum(x: Any) -> Any:
    value = _value(x)
    return _made(value.sum(), (x, lambda g: np.broadcast_to(g, value.shape)))


def _log_softmax(x: Any) -> Any:
    value = _value(x)
    value = value - value.max(-1, keepdims=True)
    y = value - np.log(np.exp(value).sum(-1, keepdims=True))
    return _made(y, (x, lambda g: g - np.exp(y) * g.sum(-1, keepdims=True)))


def _where(condition: Any, x: Any, y: Any) -> Any:
    value = np.where(condition, _value(x), _value(y))
    to_x, to_y = (lambda g: np.where(condition, g, 0)), (lambda g: np.where(condition, 0, g))
    return _made(value, (x, _summed(x, to_x)), (y, _summed(y, to_y)))


def _concatenate(parts: Sequence[Any]) -> Any:
    ends = np.cumsum([part.shape[-1] for part in parts])
    value = np.concatenate([_value(part) for part in parts], -1)
    spans = [slice(end - part.shape[-1], end) for part, end in zip(parts, ends, strict=True)]
    return _made(value, *((part, lambda g, span=span: g[..., span]) for part, span in zip(parts, spans, strict=True)))


OPS = Ops(
    exp=_exp, tanh=_tanh, sqrt=_sqrt, mean=_mean, sum=_sum, log_softmax=_log_softmax, where=_where,
    concatenate=_concatenate, stop_gradient=_value,
)  # fmt: skip
