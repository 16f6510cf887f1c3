"""Rewrites the syntax tree of a template, so that what the compiler would do by itself is a call that pays for it.

Loops count their steps, and bodies that run more than once cost as much as there is in them. Operators, slices and
keys become filters. What is written where no one sees it before it is whole is paid for piece by piece.
"""

import functools
from typing import Any

from thimble.data.sandbox.filters import INNER
from thimble.errors import BaseModelError

NODES_PER_UNIT = 16  # nodes of the syntax tree that take the time of a step
MAX_CONSTANT = 1000  # characters of a constant that may be compared with without a call

_BUILDERS = {"Dict": 8, "List": 3, "Tuple": 3, "Macro": 16, "CallBlock": 16}  # nodes that make something: units of it
_REFUSED = {"Include": "include", "Import": "import", "FromImport": "import", "Extends": "extends"}
_REFUSED |= {"EvalContextModifier": "autoescape", "ScopedEvalContextModifier": "autoescape"}


def rewrite(tree: Any) -> Any:
    """Rewrite a syntax tree in place; of one that asks for other files, raises a BaseModelError."""
    from jinja2 import nodes

    return _rewriter()(nodes).visit(tree)


@functools.cache
def _rewriter() -> type:
    from jinja2.visitor import NodeTransformer

    return type("Rewriter", (_Rewriting, NodeTransformer), {})


class _Rewriting:
    """Puts into a syntax tree what the compiler would do without a call."""

    weight = 0  # of the nodes seen so far, in units * NODES_PER_UNIT
    buffers = 0  # around the node: what is written there no one sees before all of it is

    def __init__(self, nodes: Any) -> None:
        self.nodes = nodes

    def visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        kind = type(node).__name__
        if kind in _REFUSED:
            raise BaseModelError(
                f"the chat template of the base uses {{% {_REFUSED[kind]} %}} (line {node.lineno}): expected a "
                "template that is whole by itself. Use another base, or put what it asks for in its place."
            )
        self.weight += 1 + NODES_PER_UNIT * _BUILDERS.get(kind, 0)
        return super().visit(node, *args, **kwargs)

    def _units(self, node: Any, is_buffered: bool) -> int:
        """Visit what is inside, and give back what it costs to go through it once."""
        before = self.weight
        self.buffers += is_buffered
        self.generic_visit(node)
        self.buffers -= is_buffered
        return 1 + (self.weight - before) // NODES_PER_UNIT

    def visit_For(self, node: Any) -> Any:
        units = self._units(node, node.recursive)
        node.iter = self._inner("count", node.iter, self.nodes.Const(units, lineno=node.lineno))
        return self._paid(node, units) if node.recursive else node

    def visit_Macro(self, node: Any) -> Any:
        return self._paid(node, self._units(node, True))

    visit_CallBlock = visit_Block = visit_Macro

    def _paid(self, node: Any, units: int) -> Any:
        paid = self.nodes.ExprStmt(
            self._inner("spend", self.nodes.Const(units, lineno=node.lineno)), lineno=node.lineno
        )
        node.body = [paid, *node.body]
        return node

    def visit_AssignBlock(self, node: Any) -> Any:
        self._units(node, True)
        return node

    visit_FilterBlock = visit_AssignBlock

    def visit_Output(self, node: Any) -> Any:
        self.generic_visit(node)
        if self.buffers:
            node.nodes = [self._expression(child) for child in node.nodes]
        return node

    def _expression(self, node: Any) -> Any:
        is_data = isinstance(node, self.nodes.TemplateData)
        return self.nodes.Const(node.data, lineno=node.lineno) if is_data else node

    def visit_Add(self, node: Any) -> Any:
        terms = []
        while isinstance(node, self.nodes.Add):
            terms.append(self.visit(node.right))
            node = node.left
        return self._inner("add", self.visit(node), *reversed(terms))

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return self._inner("concat", *node.nodes)

    def visit_Compare(self, node: Any) -> Any:
        self.generic_visit(node)
        (first, *more) = node.ops
        is_in = first.op in ("in", "notin")
        # A constant is as short as it stands in the template.
        if not more and (self._is_constant(first.expr) or self._is_constant(node.expr) and not is_in):
            return node
        named = [part for op in node.ops for part in (self.nodes.Const(op.op, lineno=node.lineno), op.expr)]
        return self._inner("compare", node.expr, *named)

    def visit_Getitem(self, node: Any) -> Any:
        self.generic_visit(node)
        if isinstance(node.arg, self.nodes.Slice):
            node.node = self._inner("slice", node.node)
        elif not self._is_constant(node.arg):
            node.arg = self._inner("key", node.arg)
        return node

    def visit_Pair(self, node: Any) -> Any:
        self.generic_visit(node)
        if not self._is_constant(node.key):
            node.key = self._inner("key", node.key)
        return node

    def visit_Call(self, node: Any) -> Any:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = self._inner("list", node.dyn_args)
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = self._inner("slice", node.dyn_kwargs)
        return node

    visit_Filter = visit_Test = visit_Call

    def _inner(self, name: str, value: Any, *args: Any) -> Any:
        return self.nodes.Filter(value, INNER + name, list(args), [], None, None, lineno=value.lineno)

    def _is_constant(self, node: Any) -> bool:
        if isinstance(node, self.nodes.List | self.nodes.Tuple):
            return all(map(self._is_constant, node.items))
        if isinstance(node, self.nodes.Const):
            return not isinstance(node.value, str) or len(node.value) <= MAX_CONSTANT
        return isinstance(node, self.nodes.Neg) and self._is_constant(node.node)
