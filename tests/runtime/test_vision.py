"""Which vision graph a picture is shown to, and what is said of one that there is not."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketvlm.bundle import PositionGrid, VisionVariant
from pocketvlm.errors import InputError
from pocketvlm.models.images.qwen2_vl import Qwen2VlGeometry
from pocketvlm.runtime.vision import VisionChoice, VisionGraph, choose_vision

sides = st.integers(1, 40)


@dataclass
class Preprocessor:
    geometry: Qwen2VlGeometry


def graph(width: int, height: int, tokens: int = 4) -> VisionGraph:
    return VisionGraph(
        name=f"k{tokens}_{width}x{height}",
        visual_tokens=tokens,
        preprocessor=Preprocessor(Qwen2VlGeometry(height=height, width=width)),  # type: ignore[arg-type]  # pixels are not asked for
        rows=None,  # type: ignore[arg-type]  # neither are rows
    )


GRAPHS = [graph(448, 448, 64), graph(448, 448, 16), graph(672, 336, 64), graph(336, 672, 64)]


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((100, 100), "k64_448x448"),
        ((4000, 3000), "k64_448x448"),
        ((1920, 1080), "k64_672x336"),
        ((1080, 1920), "k64_336x672"),
        ((1, 5000), "k64_336x672"),
    ],
)
def test_a_picture_takes_the_size_closest_to_its_own_ratio(size, name):
    assert choose_vision(GRAPHS, size, VisionChoice()).name == name


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=5), sides, sides)
def test_no_other_size_stretches_a_picture_less(sizes, width, height):
    graphs = [graph(*size) for size in sizes]
    chosen = choose_vision(graphs, (width, height), VisionChoice())

    def stretch(size: tuple[int, int]) -> Fraction:
        across, down = Fraction(size[0], width), Fraction(size[1], height)
        return max(across, down) / min(across, down)

    assert stretch(chosen.resolution) == min(map(stretch, sizes))
    first = next(size for size in sizes if stretch(size) == stretch(chosen.resolution))
    assert chosen.resolution == first


def test_what_an_app_names_wins_over_the_ratio():
    few = VisionChoice(visual_tokens=16)
    assert choose_vision(GRAPHS, (1920, 1080), few).name == "k16_448x448"
    tall = VisionChoice(resolution=(336, 672))
    assert choose_vision(GRAPHS, (1920, 1080), tall).name == "k64_336x672"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (VisionChoice(visual_tokens=8), "no vision graph for 8 visual tokens; this bundle has 64"),
        (VisionChoice(resolution=(448, 336)), "no vision graph for 448 x 336 pixels"),
        (
            VisionChoice(visual_tokens=16, resolution=(672, 336)),
            "no vision graph for 16 visual tokens of 672 x 336 pixels",
        ),
    ],
)
def test_a_graph_that_there_is_not_is_refused_with_those_that_there_are(wanted, said):
    with pytest.raises(InputError, match=said) as caught:
        choose_vision(GRAPHS, (1, 1), wanted)
    assert "16 visual tokens of 448 x 448 pixels" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_graph_that_cannot_be_is_refused():
    grid = PositionGrid(rows=2, columns=2)
    fine = {"name": "k", "height": 8, "width": 8, "visual_tokens": 2, "visual_tokens_full": 4}
    VisionVariant(**fine, position_grid=grid)
    for wrong in (
        {"visual_tokens": 5},
        {"visual_tokens": 0},
        {"height": 0},
        {"visual_tokens_full": 8, "position_grid": grid},
    ):
        with pytest.raises(ValueError, match="must"):
            VisionVariant(**{**fine, **wrong})
