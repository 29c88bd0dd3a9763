"""Operators of graphs, as counts: what a prediction gives times to.

What an operator takes is linear in its sizes, so operators of one kind add up; `nodes` says how
many of them a count is of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

from pocketvlm.device_bench.prediction.rates import require_kernel

__all__ = [
    "CachedAttention",
    "Elementwise",
    "Operator",
    "PlainOperator",
    "Product",
    "TowerAttention",
    "Work",
    "add_up",
]


_MOST = 2**60
"""More than any model has of anything; a bundle of a stranger may say so.

What is counted, not what is made of it: rows of a call multiply counts.
"""


@dataclass(frozen=True, kw_only=True)
class _Counts:
    def __post_init__(self) -> None:
        if min(self.counts().values()) < 0:
            raise ValueError(f"{', '.join(self.counts())} must be at least 0")

    def counts(self) -> dict[str, int]:
        """Its numbers, by their names."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        return {name: value for name, value in values if isinstance(value, int)}


@dataclass(frozen=True, kw_only=True)
class Product(_Counts):
    """Rows times weight matrices.

    Attributes:
        kernel: What multiplies them, as `Rates.products` names it.
        rows: Rows of the input.
        weights: Elements of the matrices.
        nodes: Products.
    """

    kernel: str
    rows: int
    weights: int
    nodes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kernel(self.kernel)

    @property
    def macs(self) -> int:
        """Multiplications with an addition each."""
        return self.rows * self.weights


@dataclass(frozen=True, kw_only=True)
class TowerAttention(_Counts):
    """Attention among patches.

    Attributes:
        macs: Of scores and sums.
        nodes: Attentions.
    """

    macs: int
    nodes: int = 1


@dataclass(frozen=True, kw_only=True)
class CachedAttention(_Counts):
    """Attention of a decoder's block to its cache.

    Attributes:
        rows: New rows.
        macs: Of scores and sums with all rows that there are then.
    """

    rows: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class Elementwise(_Counts):
    """Nodes that read and write every element once.

    Attributes:
        kind: `norm`, `copy`, or the name of an activation.
        elements: How many.
        nodes: Nodes.
    """

    kind: str
    elements: int
    nodes: int = 1


PlainOperator = Product | TowerAttention | Elementwise
"""An operator that reads no cache, so that its size is known without a conversation."""

Operator = PlainOperator | CachedAttention


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operators without a cache, added up by their kind.

    Attributes:
        products: One for each kernel and number of rows.
        attention: Attention among patches; `None` where there is none.
        elementwise: One for each kind.
    """

    products: tuple[Product, ...]
    elementwise: tuple[Elementwise, ...]
    attention: TowerAttention | None = None

    def __post_init__(self) -> None:
        for operator in self.operators():
            for name, count in operator.counts().items():
                if count > _MOST:
                    raise ValueError(f"{name} must be 0 to {_MOST:,}")

    def operators(self) -> Iterator[PlainOperator]:
        """All of them."""
        yield from self.products
        yield from self.elementwise
        if self.attention is not None:
            yield self.attention

    def of_rows(self, rows: int) -> Iterator[PlainOperator]:
        """The operators for this many rows, where they were counted for one."""
        for product in self.products:
            yield replace(product, rows=rows)
        for one in self.elementwise:
            yield replace(one, elements=rows * one.elements)


def add_up(operators: Iterable[PlainOperator]) -> Work:
    """Adds operators up, in the order in which their kinds first occur."""
    products: dict[tuple[str, int], Product] = {}
    elementwise: dict[str, Elementwise] = {}
    attention: TowerAttention | None = None
    for one in operators:
        if isinstance(one, Product):
            weights, nodes = one.weights, one.nodes
            before = products.get((one.kernel, one.rows))
            if before is not None:
                weights, nodes = weights + before.weights, nodes + before.nodes
            products[one.kernel, one.rows] = replace(one, weights=weights, nodes=nodes)
        elif isinstance(one, Elementwise):
            elements, nodes = one.elements, one.nodes
            if one.kind in elementwise:
                elements += elementwise[one.kind].elements
                nodes += elementwise[one.kind].nodes
            elementwise[one.kind] = replace(one, elements=elements, nodes=nodes)
        else:
            macs, nodes = (0, 0) if attention is None else (attention.macs, attention.nodes)
            attention = TowerAttention(macs=macs + one.macs, nodes=nodes + one.nodes)
    return Work(
        products=tuple(products.values()),
        elementwise=tuple(elementwise.values()),
        attention=attention,
    )
