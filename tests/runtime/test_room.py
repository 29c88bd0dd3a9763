"""Pictures that have no room are refused before any of them is encoded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.skip_empty_tiles import SkipEmptyTiles
from pocketvlm.context import RunContext
from pocketvlm.errors import InputError
from pocketvlm.models.images.tilings.anyres import MapGrid
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.runtime.conversation import Conversation

from .conftest import CountingRunner, Pair, noise, write_bundle

NAMES = ("smolvlm-tiles", "smolvlm-tiles-empty", "internvl3", "llava-next", "qwen2.5-vl")


@pytest.fixture(scope="module", params=NAMES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Pictures that are cut; with tiles that show nothing; as one map; on three axes."""
    folder = tmp_path_factory.mktemp("room")
    write_tiny_model(request.param.removesuffix("-empty"), folder / "model")
    checkpoint = Checkpoint.load(folder / "model")
    if request.param.endswith("-empty"):
        skip = SkipEmptyTiles(contrast=148)
        checkpoint = skip.apply(checkpoint, CalibrationSet.synthetic(1), RunContext(threads=1))
    return write_bundle(checkpoint, folder / "bundle")


def half_empty(seed: int) -> Image.Image:
    """Noise above, nothing below."""
    image = noise(seed, (150, 150))
    image.paste((90, 90, 90), (0, 60, 150, 150))
    return image


def test_the_last_row_decides(bundle: Bundle) -> None:
    """Two pictures in two turns, in a cache of just enough rows, and of one less."""
    first, second = half_empty(1), noise(2, (150, 60))
    roomy = CountingRunner(bundle, threads=1, capacity=4096)
    talk = Conversation(bundle, runner=roomy)
    answers = [talk.ask("One", first, max_new_tokens=1), talk.ask("Two", second, max_new_tokens=1)]
    seen = roomy.tiles
    assert seen > 0
    rows = [
        sum(a.timings.prompt_tokens + a.timings.reused_tokens for a in [one]) for one in answers
    ]
    tight = CountingRunner(bundle, threads=1, capacity=rows[1])
    talk = Conversation(bundle, runner=tight)
    assert talk.ask("One", first, max_new_tokens=1).token_ids == answers[0].token_ids
    assert talk.ask("Two", second, max_new_tokens=1).token_ids == answers[1].token_ids
    assert tight.tiles == seen
    short = CountingRunner(bundle, threads=1, capacity=rows[1] - 1)
    talk = Conversation(bundle, runner=short)
    talk.ask("One", first, max_new_tokens=1)
    of_first, kept = short.tiles, list(talk.messages)
    with pytest.raises(InputError, match=f"needs {rows[1]} rows .* for 2 pictures; allowed are"):
        talk.ask("Two", second)
    assert short.tiles == of_first
    assert talk.messages == kept


def test_positions_are_counted_before_as_they_are_laid_out(bundle: Bundle) -> None:
    """The answer of one token fits as many positions as its prompt has, and not one less."""
    image = half_empty(1)
    talk = Conversation(bundle)
    rows = talk.ask("One", image, max_new_tokens=1).timings.prompt_tokens
    assert talk._cached_layout is not None
    positions = talk._cached_layout.next_position
    assert (bundle.manifest.position_axes == 3) == (positions < rows)
    for limit, fits in ((positions, True), (positions - 1, False)):
        generation = replace(bundle.manifest.generation, max_positions=limit)
        few = replace(bundle, manifest=replace(bundle.manifest, generation=generation))
        runner = CountingRunner(few, threads=1, capacity=4096)
        talk = Conversation(few, runner=runner)
        if fits:
            talk.ask("One", image, max_new_tokens=1)
            continue
        with pytest.raises(InputError, match=f"needs {positions} positions .*; the model has"):
            talk.ask("One", image)
        assert runner.tiles == 0


def test_reduced_pictures_are_counted_as_reduced(pair: Pair) -> None:
    rows = Conversation(pair.bundle).ask("Go", noise(1), max_new_tokens=1).timings.prompt_tokens
    runner = CountingRunner(pair.bundle, threads=1, capacity=rows - 1)
    with pytest.raises(InputError, match=f"needs {rows} rows .* for 1 picture; allowed are"):
        Conversation(pair.bundle, runner=runner).ask("Go", noise(1))
    assert runner.tiles == 0


def test_a_picture_that_has_no_room_is_not_encoded_ahead(llava: Pair) -> None:
    runner = CountingRunner(llava.bundle, threads=1, capacity=15)
    talk = Conversation(llava.bundle, runner=runner)
    with pytest.raises(InputError, match="needs 16 rows of KV cache, 16 of them for 1 picture"):
        talk.encode_ahead(noise(1))
    assert runner.tiles == 0


@given(st.data())
def test_a_map_has_at_least_and_at_most_so_many_rows(data: st.DataObject) -> None:
    side = data.draw(st.integers(2, 6))
    per_tile = side * side
    rows, columns = data.draw(st.sampled_from([(0, 0), (1, 1), (1, 2), (3, 1), (2, 2), (3, 3)]))
    sizes = st.integers(1, 400)
    grid = MapGrid(
        rows=rows,
        columns=columns,
        picture=(data.draw(sizes), data.draw(sizes)),
        most_area=data.draw(st.sampled_from([None, 1, 4])),
    )
    lines = grid._lines(side)
    if rows and not all(lines):
        return  # a line thinner than a token: no picture is fitted into such a grid
    kept = data.draw(st.integers(1, per_tile))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    indices = [np.sort(rng.permutation(per_tile)[:kept]) for _ in range(grid.tiles)]
    found = len(grid.order(per_tile).kept(indices, per_tile).offsets)
    assert grid.least_rows(per_tile, kept) <= found <= grid.most_rows(per_tile, kept)
    if kept == per_tile:
        assert grid.least_rows(per_tile, kept) == found
