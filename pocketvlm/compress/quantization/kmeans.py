"""Weighted k-means: deterministic for a seed, whatever the number of threads.

Lloyd's algorithm behind k-means++ seeds (Arthur and Vassilvitskii, SODA 2007), with restarts.
Every sum is taken in float64 and in a fixed order, so that threads do not show in a single bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cluster", "least_places", "nearest_centroids", "sample_rows"]

_CHUNK_ELEMENTS = 1 << 21
_SCREENED = 4096
_SCREENING_STEPS = 6


def nearest_centroids(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid of every vector, int64 [n]; the first among equals.

    Args:
        vectors: [n, d].
        centroids: [k, d].
    """
    table = centroids.to(torch.float32)
    halves = table.square().sum(1) / 2
    step = max(1, _CHUNK_ELEMENTS // table.shape[0])
    found = [
        least_places(torch.addmm(halves, piece.to(torch.float32), table.T, alpha=-1))
        for piece in vectors.split(step)
    ]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def least_places(scores: Tensor) -> Tensor:
    """`scores.argmin(-1)`, by numpy, which is several times as fast on a CPU."""
    return torch.from_numpy(scores.numpy().argmin(-1))


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

    Restarts compete on a part of the sample; the best goes on with all of it. A cluster that
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
    """k-means++: each next seed with a probability in proportion to what it could save."""
    columns = points.T.contiguous()
    draws = torch.rand(k, generator=generator, dtype=torch.float64)
    distances = torch.full_like(mass, float("inf"))
    seeds = torch.empty(k, points.shape[1], dtype=points.dtype)
    chances = mass
    for number in range(k):
        running = chances.cumsum(0)
        total = running[-1]
        if float(total) > 0:
            place = int(torch.searchsorted(running, draws[number] * total, right=True))
            place = min(place, points.shape[0] - 1)
        else:
            # Fewer distinct points than seeds: any will do.
            place = int(draws[number] * points.shape[0])
        seeds[number] = points[place]
        apart = torch.zeros_like(mass)
        for column, value in zip(columns, points[place].tolist(), strict=True):
            apart += (column - value).square_()
        distances = torch.minimum(distances, apart)
        chances = distances * mass
    return seeds


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
