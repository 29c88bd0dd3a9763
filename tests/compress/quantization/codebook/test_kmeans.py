"""k-means: what it finds, and that neither a second run nor a second thread changes a bit of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.compress.quantization.codebook.kmeans import (
    LeastProducts,
    cluster,
    nearest_centroids,
)


def blobs(count, k, d, seed=0, spread=0.05):
    generator = torch.Generator().manual_seed(seed)
    middles = 4 * torch.rand(k, d, generator=generator)
    owner = torch.arange(count) % k
    return middles[owner] + spread * torch.randn(count, d, generator=generator), middles


def loss_of(points, weights, centroids):
    """By a loop, in float64."""
    total = 0.0
    for point, weight in zip(points.double(), weights.double(), strict=True):
        total += float(weight * (centroids.double() - point).square().sum(1).min())
    return total


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 9),
    d=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_the_nearest_is_the_nearest(n, k, d, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, d, generator=generator)
    table = torch.randn(k, d, generator=generator)
    distances = (points[:, None].double() - table.double()).square().sum(2)
    chosen = nearest_centroids(points, table)
    reached = distances[torch.arange(n), chosen]
    assert torch.allclose(reached, distances.min(1).values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("groups", "n", "k"), [(1, 1025, 256), (3, 700, 256), (2, 5, 3), (1, 0, 4)]
)
def test_the_least_product_is_found_in_whole_and_broken_pieces(groups, n, k):
    generator = torch.Generator().manual_seed(n)
    left = torch.randn(groups, n, 5, generator=generator)
    right = torch.randn(groups, 5, k, generator=generator)
    products = left.double() @ right.double()
    search, before = LeastProducts(right, n), torch.get_num_threads()
    for turned in (left, left.flip(1)):
        expected = products if turned is left else products.flip(1)
        found = search.find(turned)
        assert found.shape == (groups, n)
        reached = expected.gather(2, found[..., None])[..., 0]
        assert torch.allclose(reached, expected.amin(2), rtol=1e-5, atol=1e-5)
    assert torch.get_num_threads() == before


def test_clusters_far_apart_are_found():
    points, middles = blobs(3000, 12, 3)
    found = cluster(points, torch.ones(3000), 12).float()
    apart = torch.cdist(middles, found).min(1).values
    assert float(apart.max()) < 0.03


def test_on_a_line_the_optimum_is_found():
    """All ways to cut eleven sorted weighted points into three intervals."""
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(11, generator=generator).sort().values
    weights = torch.rand(11, generator=generator)
    best = float("inf")
    for a, b in itertools.combinations(range(1, 11), 2):
        loss = 0.0
        for part in (slice(0, a), slice(a, b), slice(b, 11)):
            x, w = points[part].double(), weights[part].double()
            loss += float((w * (x - (w * x).sum() / w.sum()).square()).sum())
        best = min(best, loss)
    found = cluster(points[:, None], weights, 3, restarts=8)
    assert loss_of(points[:, None], weights, found) == pytest.approx(best, rel=1e-3, abs=1e-5)


def test_weights_draw_centroids_to_where_they_are():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(4000, 2, generator=generator)
    weights = torch.where(points[:, 0] < 0.25, 50.0, 1.0)
    weighted = cluster(points, weights, 16).float()
    alike = cluster(points, torch.ones(4000), 16).float()
    assert loss_of(points, weights, weighted) < 0.6 * loss_of(points, weights, alike)


def test_lloyd_and_restarts_beat_a_random_choice_of_points():
    points, _ = blobs(2000, 40, 4, spread=0.3)
    weights = torch.ones(2000)
    generator = torch.Generator().manual_seed(0)
    random = points[torch.randperm(2000, generator=generator)[:32]]
    assert loss_of(points, weights, cluster(points, weights, 32)) < 0.7 * loss_of(
        points, weights, random
    )


@pytest.mark.parametrize("d", [1, 4])
def test_threads_and_runs_give_the_same_bytes(d):
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(30000, d, generator=generator)
    weights = torch.rand(30000, generator=generator)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(cluster(points, weights, 64, sample=20000).numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert cluster(points, weights, 64, seed=1).numpy().tobytes() != found[0]


def test_few_distinct_points_leave_no_centroid_without_a_value():
    points = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(8, 1)
    found = cluster(points, torch.ones(16), 8)
    assert bool(torch.isfinite(found).all())
    assert loss_of(points, torch.ones(16), found) == 0


def test_an_empty_cluster_starts_again_where_the_fit_is_worst(monkeypatch):
    from pocketvlm.compress.quantization.codebook import kmeans

    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [10.0, 10.0], [11.0, 10.0]])

    def badly(points, mass, k, generator):
        # The second seed is nearest to nothing.
        return torch.tensor([[5.0, 5.0], [500.0, 500.0]], dtype=points.dtype)

    monkeypatch.setattr(kmeans, "_seed_centroids", badly)
    found = cluster(points, torch.ones(4), 2)
    assert loss_of(points, torch.ones(4), found) == pytest.approx(1.0)


@settings(max_examples=15)
@given(scale=st.sampled_from([1e-3, 1.0, 100.0]), k=st.sampled_from([2, 5, 16]))
def test_more_centroids_never_lose_much(scale, k):
    generator = torch.Generator().manual_seed(0)
    points, weights = scale * torch.randn(400, 2, generator=generator), torch.ones(400)
    few, more = (cluster(points, weights, size) for size in (k, 2 * k))
    assert loss_of(points, weights, more) < loss_of(points, weights, few)


@pytest.mark.parametrize(
    ("points", "weights", "k", "what"),
    [
        (torch.zeros(3, 2), torch.ones(3), 4, "4 centroids need as many vectors"),
        (torch.tensor([[float("nan")]]), torch.ones(1), 1, "finite"),
        (torch.zeros(3, 2), torch.tensor([1.0, -1.0, 1.0]), 2, "negative"),
        (torch.full((3, 2), 1e6), torch.ones(3), 2, "float16"),
    ],
)
def test_what_cannot_be_clustered_is_refused(points, weights, k, what):
    with pytest.raises(ValueError, match=what):
        cluster(points, weights, k)
