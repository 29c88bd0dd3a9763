"""Which option each layer takes: an integer programme under a budget of bytes.

The multiple-choice knapsack problem with fixed charges, solved exactly by HiGHS through
`scipy.optimize.milp`: minimize sum_i sum_j loss_ij x_ij with one x_ij = 1 per layer and
sum_ij size_ij x_ij + sum_t size_t y_t <= budget, where x_ij <= y_t for every option that reads the
shared table t: what several layers share is paid once.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Candidate", "allocate", "least_bytes", "price_of_a_byte", "total_bytes"]

# HiGHS stops at an absolute gap of 1e-6, which cannot be set: losses are scaled far above it.
_SCALE = 1e6


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One option of one layer.

    Attributes:
        loss: What it costs in quality; losses of different layers are added up.
        size: What it costs in bytes, without the shared table.
        table: Number of the shared table that it reads; `None` where it shares nothing.
    """

    loss: float
    size: int
    table: int | None = None


def allocate(
    layers: Sequence[Sequence[Candidate]], budget: int, tables: Sequence[int] = ()
) -> tuple[int, ...]:
    """Index of the chosen candidate of every layer; the least sum of losses within the budget.

    Deterministic. A candidate that another one of its layer equals or beats in both respects,
    without a table that it does not read itself, is never chosen; of equal ones the first stands.

    Args:
        layers: Candidates of each layer.
        budget: Bytes that may be used.
        tables: Bytes of each shared table, paid once if any chosen candidate reads it.

    Raises:
        ValueError: The smallest choice exceeds the budget.
    """
    smallest = least_bytes(layers, tables)
    if smallest > budget:
        raise ValueError(f"the smallest candidates take {smallest} bytes, the budget is {budget}")
    programme = _Programme(layers, tables)
    excluded: list[NDArray[np.float64]] = []
    while True:
        found = programme.solve(programme.losses, budget, excluded)
        if total_bytes(layers, found, tables) <= budget:
            return found
        # Bytes are whole and the solver's tolerance is not: such a point is cut off.
        excluded.append(programme.point(found))


def least_bytes(layers: Sequence[Sequence[Candidate]], tables: Sequence[int] = ()) -> int:
    """Bytes of the smallest choice, tables included."""
    if all(item.table is None for row in layers for item in row):
        return sum(min(item.size for item in row) for row in layers)
    programme = _Programme(layers, tables)
    return total_bytes(layers, programme.solve(programme.sizes, None, ()), tables)


def total_bytes(
    layers: Sequence[Sequence[Candidate]], chosen: Sequence[int], tables: Sequence[int] = ()
) -> int:
    """Bytes of a choice; every table that it reads counts once."""
    items = [row[index] for row, index in zip(layers, chosen, strict=True)]
    read = {item.table for item in items if item.table is not None}
    return sum(item.size for item in items) + sum(tables[table] for table in read)


def price_of_a_byte(
    layers: Sequence[Sequence[Candidate]],
    budget: int,
    tables: Sequence[int] = (),
    read: Sequence[int] = (),
) -> float:
    """Loss that one more byte would save, from the relaxation of the same programme.

    Args:
        layers: Candidates of each layer.
        budget: Bytes that may be used.
        tables: Bytes of each shared table.
        read: Tables that are paid for; candidates that read another one are left aside.
    """
    from scipy.optimize import linprog

    usable = [[item for item in row if item.table is None or item.table in read] for row in layers]
    programme = _Programme(usable, ())
    solved = linprog(
        programme.losses,
        A_ub=programme.sizes[None],
        b_ub=[float(budget - sum(tables[table] for table in read))],
        A_eq=programme.once,
        b_eq=np.ones(len(layers)),
        bounds=(0, 1),
        method="highs",
    )
    return max(0.0, -float(solved.ineqlin.marginals[0]))


class _Programme:
    """The programme's matrices, over one variable for each candidate and each table.

    Attributes:
        losses: Of candidates; tables lose nothing.
        sizes: Bytes of candidates and tables.
        once: Which candidates belong to a layer, [layers, variables].
        links: One row for each candidate that reads a table: 1 for it, -1 for the table.
    """

    def __init__(self, layers: Sequence[Sequence[Candidate]], tables: Sequence[int]) -> None:
        from scipy.sparse import coo_array

        pairs = [(row, index) for row, items in enumerate(layers) for index in _undominated(items)]
        items = [layers[row][index] for row, index in pairs]
        readers = [place for place, item in enumerate(items) if tables and item.table is not None]
        count = len(pairs) + len(tables)
        links, ones = np.arange(len(readers)), np.ones(len(readers))
        read = [len(pairs) + (items[place].table or 0) for place in readers]
        self._pairs = pairs
        self.losses = np.array([item.loss for item in items] + [0.0] * len(tables))
        self.sizes = np.array([item.size for item in items] + list(tables), dtype=np.float64)
        self.once = coo_array(
            (np.ones(len(pairs)), ([row for row, _ in pairs], np.arange(len(pairs)))),
            shape=(len(layers), count),
        )
        self.links = coo_array(
            (np.concatenate([ones, -ones]), (np.tile(links, 2), readers + read)),
            shape=(len(readers), count),
        )

    def solve(
        self, cost: NDArray[np.float64], budget: int | None, excluded: Sequence[NDArray[np.float64]]
    ) -> tuple[int, ...]:
        """Index of the candidate of every layer that together cost least."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        layers = self.once.shape[0]
        constraints = [LinearConstraint(self.once, 1, 1)]
        if self.links.shape[0]:
            constraints.append(LinearConstraint(self.links, -np.inf, 0))
        if budget is not None:
            unit = math.gcd(*(int(size) for size in self.sizes)) or 1
            constraints.append(LinearConstraint(self.sizes[None] / unit, -np.inf, budget // unit))
        constraints += [LinearConstraint(cut[None], -np.inf, layers - 1) for cut in excluded]
        largest = float(cost.max())
        with _native_output_to_stderr():
            solved = milp(
                cost * (_SCALE / largest if largest > 0 else 1.0),
                integrality=np.ones(len(cost)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0},
            )
        if solved.x is None:
            raise ArithmeticError(f"the integer programme was not solved: {solved.message}")
        chosen = zip(self._pairs, solved.x, strict=False)  # tables follow the candidates
        return tuple(index for (_, index), value in chosen if value > 0.5)  # noqa: PLR2004  (binary)

    def point(self, chosen: Sequence[int]) -> NDArray[np.float64]:
        """The candidates of a choice as ones, [variables]."""
        made = np.zeros(len(self.losses))
        for place, (row, index) in enumerate(self._pairs):
            made[place] = chosen[row] == index
        return made


@contextmanager
def _native_output_to_stderr() -> Iterator[None]:
    """Keeps standard output clean: HiGHS may print a line whatever it is told."""
    libc = ctypes.CDLL(None)
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _undominated(candidates: Sequence[Candidate]) -> list[int]:
    """Indices of candidates that no other one equals or beats with the same table or without."""

    def rank(index: int) -> tuple[int, float, bool, int]:
        item = candidates[index]
        return item.size, item.loss, item.table is not None, index

    kept: list[int] = []
    least: dict[int | None, float] = {}
    for index in sorted(range(len(candidates)), key=rank):
        item = candidates[index]
        if item.loss < min(least.get(None, math.inf), least.get(item.table, math.inf)):
            kept.append(index)
            least[item.table] = item.loss
    return kept
