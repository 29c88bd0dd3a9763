"""Weighted k-means: deterministic for a seed, whatever the number of threads.

Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii, SODA 2007), with restarts.
Every sum is taken in float64 and in a fixed order, so that threads do not show in a single bit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["LeastProducts", "cluster", "nearest_centroids", "sample_rows"]

# Products of one piece: half a megabyte, which stays in one core's cache.
_PIECE_ELEMENTS = 1 << 17
_SCREENED = 4096
_SCREENING_STEPS = 6


def nearest_centroids(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid of every vector, int64 [n]; the first among equals.

    Args:
        vectors: [n, d].
        centroids: [k, d].
    """
    table = centroids.to(torch.float32)
    length = table.shape[1]
    # Half the squared distances of a vector, less a constant, are one product.
    left = torch.ones(1, vectors.shape[0], length + 1)
    left[0, :, :length] = vectors
    right = torch.cat([-table, table.square().sum(1, keepdim=True) / 2], dim=1)
    return LeastProducts(right.T.contiguous()[None], vectors.shape[0]).find(left)[0]


class LeastProducts:
    """`(left @ right).argmin(-1)`, again and again for one right side.

    On one thread and in pieces that stay in its core's cache: moving what a second core has made
    costs more than that core saves. So the number of threads shows in no choice either. Products
    live in one buffer, since fresh pages cost as much as they do; and numpy's argmin is several
    times as fast as torch's.

    Args:
        right: float32 [groups, d, k].
        count: Rows of the left sides, n.
    """

    def __init__(self, right: Tensor, count: int) -> None:
        groups, _, k = right.shape
        self._right = right
        self._step = max(1, _PIECE_ELEMENTS // (groups * k))
        self._products = torch.empty(groups, min(count, self._step), k)
        self._array = self._products.numpy()

    def find(self, left: Tensor) -> Tensor:
        """The first least product of every row of [groups, n, d], int64 [groups, n]."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if left.shape[1] == self._products.shape[1]:
                torch.bmm(left, self._right, out=self._products)
                return torch.from_numpy(self._array.argmin(-1))
            found = []
            for piece in left.split(self._step, dim=1):
                torch.bmm(piece, self._right, out=self._products[:, : piece.shape[1]])
                found.append(self._array[:, : piece.shape[1]].argmin(-1))
            return torch.from_numpy(np.concatenate(found, axis=1))
        finally:
            torch.set_num_threads(threads)


def sample_rows(count: int, most: int, generator: torch.Generator) -> Tensor:
    """At most `most` of `count` indices in ascending order, each drawn once."""
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:most].sort().values


def cluster(
    vectors: Tensor,
    weights: Tensor,
    k: int,
    *,
    seed: int = 0,
    restarts: int = 2,
    steps: int = 12,
    tolerance: float = 1e-3,
    sample: int = 8192,
) -> Tensor:
    """Finds k centroids with little weighted squared distance to the vectors.

    Restarts compete on a part of the sample; the best continues with all of it. A cluster that
    loses its last vector starts again at the vector that is fitted worst.

    Args:
        vectors: [n, d].
        weights: How much each vector counts, [n], none negative.
        k: Centroids.
        seed: Of every random choice.
        restarts: Seedings that are tried.
        steps: Lloyd's iterations at most.
        tolerance: Stops where an iteration gains less than this share of the loss.
        sample: Vectors that are fitted at most, or 32 a centroid where that is more; the rest are
            left out at random.

    Returns:
        float16 [k, d].

    Raises:
        ValueError: There are fewer vectors than centroids, or a value is not finite.
    """
    if k > vectors.shape[0]:
        raise ValueError(f"{k} centroids need as many vectors, and there are {vectors.shape[0]}")
    if not bool(torch.isfinite(vectors).all() and torch.isfinite(weights).all()):
        raise ValueError("vectors and their weights must be finite")
    if bool((weights < 0).any()):
        raise ValueError("weights must not be negative")
    generator = torch.Generator().manual_seed(seed)
    chosen = sample_rows(vectors.shape[0], max(sample, 32 * k), generator)
    points = vectors[chosen].to(torch.float64)
    mass = weights[chosen].to(torch.float64)
    if float(_ordered_sum(mass)) == 0:
        mass = torch.ones_like(mass)
    if points.shape[1] == 1:
        # On a line, sorted points make every cluster an interval.
        places = torch.argsort(points[:, 0], stable=True)
        points, mass = points[places], mass[places]
    few = sample_rows(points.shape[0], max(_SCREENED, 8 * k), generator)
    best: Tensor | None = None
    least = float("inf")
    for _ in range(restarts):
        seeds = _seed_centroids(points[few], mass[few], k, generator)
        found, loss = _lloyd(points[few], mass[few], seeds, _SCREENING_STEPS, tolerance)
        if loss < least or best is None:
            best, least = found, loss
    if best is None:
        raise ValueError(f"restarts must be at least 1, not {restarts}")
    final, _ = _lloyd(points, mass, best, steps, tolerance)
    rounded = final.to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError("centroids are too large for float16")
    return rounded


def _seed_centroids(points: Tensor, mass: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next seed with a probability in proportion to what it could save.

    In numpy and in place: a seed is a dozen steps over few points, where torch's calls cost more
    than their work.
    """
    values, weights = points.numpy(), mass.numpy()
    columns = np.ascontiguousarray(values.T)
    draws = torch.rand(k, generator=generator, dtype=torch.float64).tolist()
    distances = np.full_like(weights, np.inf)
    chances, apart = weights.copy(), np.empty_like(columns)
    running, total_apart = np.empty_like(weights), np.empty_like(weights)
    places = np.empty(k, dtype=np.int64)
    for number, draw in enumerate(draws):
        np.cumsum(chances, out=running)
        total = running[-1]
        if total > 0:
            place = int(running.searchsorted(draw * total, side="right"))
            place = min(place, len(weights) - 1)
        else:
            # Fewer distinct points than seeds: any will do.
            place = int(draw * len(weights))
        places[number] = place
        np.subtract(columns, columns[:, place, None], out=apart)
        np.multiply(apart, apart, out=apart)
        np.add.reduce(apart, axis=0, out=total_apart)
        np.minimum(distances, total_apart, out=distances)
        np.multiply(distances, weights, out=chances)
    return points[torch.from_numpy(places)]


def _lloyd(
    points: Tensor, mass: Tensor, centroids: Tensor, steps: int, tolerance: float
) -> tuple[Tensor, float]:
    """Lloyd's iterations; returns the best centroids that were seen, and their loss."""
    assign = _intervals if points.shape[1] == 1 else nearest_centroids
    best, least = centroids, float("inf")
    for _ in range(steps):
        chosen = assign(points, centroids)
        apart = (points - centroids[chosen]).square_().sum(1).mul_(mass)
        loss = float(_ordered_sum(apart))
        if loss < least:
            best = centroids
        if not loss < least * (1 - tolerance):
            least = min(loss, least)
            break
        least = loss
        centroids = _means(points, mass, chosen, centroids, apart)
    return best, least


def _means(
    points: Tensor, mass: Tensor, chosen: Tensor, centroids: Tensor, apart: Tensor
) -> Tensor:
    k = centroids.shape[0]
    totals = torch.bincount(chosen, weights=mass, minlength=k)
    sums = [
        torch.bincount(chosen, weights=mass * column, minlength=k) for column in points.unbind(1)
    ]
    means = torch.stack(sums, dim=1) / totals[:, None]
    empty = totals <= 0
    count = int(empty.sum())
    if count:
        worst = torch.argsort(apart, descending=True, stable=True)[:count]
        means[empty] = points[worst]
    return means


def _intervals(points: Tensor, centroids: Tensor) -> Tensor:
    """`nearest_centroids` of points on a line."""
    line, places = centroids[:, 0].sort(stable=True)
    borders = (line[1:] + line[:-1]) / 2
    return places[torch.searchsorted(borders, points[:, 0].contiguous())]


def _ordered_sum(values: Tensor) -> Tensor:
    """A sum whose order no number of threads changes."""
    return values.cumsum(0)[-1]
