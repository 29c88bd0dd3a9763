"""Inserts counting into a parsed template, before Jinja compiles it."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.visitor import NodeTransformer

__all__ = ["CHARGE", "CONCAT", "TICK", "GenerationTag", "Instrument"]

# Templates cannot use these names as filters: they do not begin with a letter.
CHARGE, TICK, CONCAT = " charge", " tick", " concat"


class Instrument(NodeTransformer):
    """Inserts counting into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(1), TICK), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_filtered(nodes.Const(1), TICK), node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        first, *others = node.nodes
        return _filtered(first, CONCAT, others)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _charged(node.expr)
        for operand in node.ops:
            operand.expr = _charged(operand.expr)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _charged(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _charged(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _charged(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _charged(node.node)
        return node

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        kind = type(node).__name__
        raise TemplateSyntaxError(f"{kind} is not available to chat templates", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse
    # {% autoescape %}: its argument is evaluated while the template is compiled.
    visit_EvalContextModifier = visit_ScopedEvalContextModifier = _refuse


def _filtered(node: nodes.Expr, name: str, arguments: list[nodes.Expr] | None = None) -> nodes.Expr:
    return nodes.Filter(node, name, arguments or [], [], None, None, lineno=node.lineno)


def _charged(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filtered(node, CHARGE)


class GenerationTag(Extension):
    """Renders the body of `{% generation %}`, with which templates mark answers for training."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: variables set inside stay inside.
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> Any:
        return caller()
