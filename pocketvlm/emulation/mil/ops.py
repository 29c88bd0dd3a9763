"""The operators that this project's Core ML programs use, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pocketvlm.emulation.mil.elementwise import ELEMENTWISE
from pocketvlm.emulation.mil.indexing import INDEXING
from pocketvlm.emulation.mil.layout import LAYOUT
from pocketvlm.emulation.mil.neural import NEURAL
from pocketvlm.emulation.mil.types import Array

__all__ = ["LIST_PARAMETERS", "MOVERS", "OPERATORS", "Operator"]

Operator = Callable[..., Array | tuple[Array, ...]]
"""Arguments by the parameter names of the operator's specification."""

OPERATORS: Mapping[str, Operator] = {**ELEMENTWISE, **INDEXING, **LAYOUT, **NEURAL}
"""Everything except constants and states, which `program` handles itself."""

_COMPUTING = {
    "cumsum",
    "fill",
    "fill_like",
    "one_hot",
    "pad",
    "scatter",
    "scatter_along_axis",
    "scatter_nd",
}

MOVERS = (LAYOUT.keys() | INDEXING.keys()) - _COMPUTING
"""Operators whose results are elements of their arguments, so that none needs rounding again."""

LIST_PARAMETERS = frozenset({"values"})
"""Parameters that take several values at once."""
