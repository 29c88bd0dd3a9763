"""Which option each layer takes: an integer programme under a budget of bytes.

The multiple-choice knapsack problem, solved exactly by HiGHS through `scipy.optimize.milp`:
minimize sum_i sum_j loss_ij x_ij with one x_ij = 1 a layer and sum bytes_ij x_ij <= budget.
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

__all__ = ["Candidate", "allocate", "price_of_a_byte"]

# HiGHS stops at an absolute gap of 1e-6, which cannot be set: losses are scaled far above it.
_SCALE = 1e6


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One option of one layer.

    Attributes:
        loss: What it costs in quality; losses of different layers are added up.
        size: What it costs in bytes.
    """

    loss: float
    size: int


def allocate(layers: Sequence[Sequence[Candidate]], budget: int) -> tuple[int, ...]:
    """Index of the chosen candidate of every layer; the least sum of losses within the budget.

    Deterministic. A candidate that another one of its layer equals or beats in both respects is
    never chosen; of equal ones the first stands.

    Raises:
        ValueError: The smallest candidates together exceed the budget.
    """
    kept = [_undominated(candidates) for candidates in layers]
    pairs = [(row, index) for row, indices in enumerate(kept) for index in indices]
    smallest = sum(min(item.size for item in candidates) for candidates in layers)
    if smallest > budget:
        raise ValueError(f"the smallest candidates take {smallest} bytes, the budget is {budget}")
    excluded: list[NDArray[np.float64]] = []
    while True:
        chosen = _solve(layers, pairs, budget, excluded)
        found = tuple(pairs[place][1] for place in chosen)
        if sum(layers[row][index].size for row, index in enumerate(found)) <= budget:
            return found
        # Bytes are whole and the solver's tolerance is not: such a point is cut off.
        cut = np.zeros(len(pairs))
        cut[chosen] = 1
        excluded.append(cut)


def price_of_a_byte(layers: Sequence[Sequence[Candidate]], budget: int) -> float:
    """Loss that one more byte would save, from the relaxation of the same programme."""
    from scipy.optimize import linprog

    pairs = [(row, index) for row, found in enumerate(layers) for index in range(len(found))]
    losses, sizes, once = _matrices(layers, pairs)
    solved = linprog(
        losses,
        A_ub=sizes[None],
        b_ub=[float(budget)],
        A_eq=once,
        b_eq=np.ones(len(layers)),
        bounds=(0, 1),
        method="highs",
    )
    return max(0.0, -float(solved.ineqlin.marginals[0]))


def _solve(
    layers: Sequence[Sequence[Candidate]],
    pairs: Sequence[tuple[int, int]],
    budget: int,
    excluded: Sequence[NDArray[np.float64]],
) -> list[int]:
    """Places in `pairs` of the best choice, layer by layer."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    losses, sizes, once = _matrices(layers, pairs)
    unit = math.gcd(*(int(size) for size in sizes)) or 1
    constraints = [
        LinearConstraint(once, 1, 1),
        LinearConstraint(sizes[None] / unit, -np.inf, budget // unit),
        *(LinearConstraint(cut[None], -np.inf, len(layers) - 1) for cut in excluded),
    ]
    largest = float(losses.max())
    with _native_output_to_stderr():
        solved = milp(
            losses * (_SCALE / largest if largest > 0 else 1.0),
            integrality=np.ones(len(pairs)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    if solved.x is None:
        raise ArithmeticError(f"the integer programme was not solved: {solved.message}")
    return [place for place, value in enumerate(solved.x) if value > 0.5]  # noqa: PLR2004  (binary)


@contextmanager
def _native_output_to_stderr() -> Iterator[None]:
    """Keeps standard output clean: HiGHS may print a line of its own whatever it is told."""
    libc = ctypes.CDLL(None)
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _matrices(
    layers: Sequence[Sequence[Candidate]], pairs: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Losses and sizes [pairs], and which pairs belong to a layer [layers, pairs]."""
    losses = np.array([layers[row][index].loss for row, index in pairs])
    sizes = np.array([float(layers[row][index].size) for row, index in pairs])
    once = np.zeros((len(layers), len(pairs)))
    for place, (row, _) in enumerate(pairs):
        once[row, place] = 1
    return losses, sizes, once


def _undominated(candidates: Sequence[Candidate]) -> list[int]:
    """Indices of the candidates that no other one equals or beats in both respects."""
    kept: list[int] = []
    best = math.inf
    for index in sorted(
        range(len(candidates)), key=lambda i: (candidates[i].size, candidates[i].loss, i)
    ):
        if candidates[index].loss < best:
            kept.append(index)
            best = candidates[index].loss
    return kept
