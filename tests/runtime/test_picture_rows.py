"""Tiles that make up a map: rows equal torch's, whatever is dropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.bundle import Bundle, sign_bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.tokens.baseline.fixed import FixedReducer
from pocketvlm.context import RunContext
from pocketvlm.errors import BundleError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.processor import user_message
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.reference_graph.forward import VisualTokens, embed_prompts
from pocketvlm.runtime.picture_rows import PictureRows
from pocketvlm.runtime.splice import embed_rows, lay_out_prompt

PER_TILE = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("map") / "llava-next"
    write_tiny_model("llava-next", folder)
    return Checkpoint.load(folder)


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("map") / "llava-onevision"
    write_tiny_model("llava-onevision", folder)
    return Checkpoint.load(folder)


def tiles_of(grids, indices, width, seed):
    """Random features, one entry per tile of every picture."""
    rng = np.random.default_rng(seed)
    return [
        [
            (rng.standard_normal((1, len(indices), width), np.float32), np.array([indices]))
            for _ in range(grid.tiles)
        ]
        for grid in grids
    ]


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=2),
    kept=st.sets(st.integers(0, PER_TILE - 1), min_size=1),
    policy=st.sampled_from(["original", "consecutive", None]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("kind", ["checkpoint", "onevision"])
def test_rows_and_positions_equal_torch(request, kind, sizes, kept, policy, seed):
    checkpoint = request.getfixturevalue(kind)
    indices = sorted(kept) if policy else list(range(PER_TILE))
    reducer = FixedReducer(tuple(indices), positions=policy) if policy else None
    reduced = replace(checkpoint, reducer=reducer)
    spec = checkpoint.spec
    grids = spec.tiling.grids(sizes)
    ids = checkpoint.processor.encode([user_message("so?", len(sizes))], grids)
    tiles = tiles_of(grids, indices, spec.decoder.hidden_size, seed)
    flat = [tile for own in tiles for tile in own]
    visual = VisualTokens(
        embeds=torch.from_numpy(np.concatenate([embeds for embeds, _ in flat])),
        indices=torch.from_numpy(np.concatenate([found for _, found in flat])),
    )
    embedding = checkpoint.model.get_submodule(spec.decoder.embedding)
    row = checkpoint.model.get_parameter(spec.line_break).detach().numpy()
    rows = PictureRows(per_tile=PER_TILE, line_break=row)
    pictures = [
        picture
        for serial, (own, grid) in enumerate(zip(tiles, grids, strict=True))
        for picture in rows.arrange(own, grid, serial=serial)
    ]
    layout = lay_out_prompt(
        ids,
        pictures,
        image_token_id=spec.image_token_id,
        keeps_positions=policy != "consecutive",
    )
    with torch.inference_mode():
        expected = embed_prompts(reduced, torch.tensor([ids]), visual, grids)
        found = embed_rows(
            layout, pictures, lambda tokens: embedding(torch.tensor([list(tokens)])).numpy()
        )
    np.testing.assert_allclose(found, expected.embeds.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(layout.positions[0], expected.positions[0])
    assert layout.next_position == int(expected.next_position)
    count = sum(grid.most_rows(PER_TILE, len(indices)) for grid in grids)
    text = sum(token != spec.image_token_id for token in ids)
    assert len(layout.codes) <= count + text
    if reducer is None:
        assert len(layout.codes) == len(ids)


def test_tiles_without_their_grids_are_an_error(checkpoint):
    visual = VisualTokens(
        embeds=torch.zeros(2, PER_TILE, 64), indices=torch.arange(PER_TILE).expand(2, -1)
    )
    ids = torch.full((1, 32), checkpoint.spec.image_token_id)
    with pytest.raises(ValueError, match="their grids are not given"):
        embed_prompts(checkpoint, ids, visual)


def test_prompts_of_one_batch_must_keep_as_many_rows(checkpoint):
    grid = checkpoint.spec.tiling.grid(300, 50)
    kept = torch.tensor([[5], [0]]).repeat(1, grid.tiles).view(-1, 1)
    visual = VisualTokens(embeds=torch.zeros(len(kept), 1, 64), indices=kept)
    ids = torch.full((2, grid.placeholders(PER_TILE)), checkpoint.spec.image_token_id)
    with pytest.raises(ValueError, match="kept rows of different numbers"):
        embed_prompts(checkpoint, ids, visual, [grid])


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("map") / "bundle"
    manifest = write_graphs(checkpoint, (ToOnnx(),), path, "", RunContext(threads=1))
    return Bundle(path=path, manifest=manifest)


def test_a_bundle_holds_the_row_behind_lines(checkpoint, bundle):
    row = checkpoint.model.get_parameter(checkpoint.spec.line_break).detach().numpy()
    np.testing.assert_array_equal(PictureRows.from_bundle(bundle).line_break, row)
    assert (bundle.path / "line_break.f32").stat().st_size == 4 * len(row)
    Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds 0 bytes, which are not whole"),
        (b"12345", "holds 5 bytes, which are not whole"),
        (np.array([1.0, np.nan], "<f4").tobytes(), "a number that is not finite"),
    ],
)
def test_a_damaged_row_is_refused_in_one_line(bundle, tmp_path, content, message):
    (tmp_path / "line_break.f32").write_bytes(content)
    damaged = Bundle(path=tmp_path, manifest=sign_bundle(tmp_path, bundle.manifest))
    with pytest.raises(BundleError, match=message) as caught:
        PictureRows.from_bundle(damaged)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row", [None, np.zeros(3, np.float32)])
def test_a_row_of_another_width_is_refused(checkpoint, row):
    grid = checkpoint.spec.tiling.grid(64, 64)
    (tiles,) = tiles_of([grid], list(range(PER_TILE)), 64, 0)
    with pytest.raises(BundleError, match="need a row of 64 numbers after each line"):
        PictureRows(per_tile=PER_TILE, line_break=row).arrange(tiles, grid)


def test_a_bundle_that_names_no_file_inside_is_refused(bundle):
    prompt = replace(bundle.manifest.prompt, line_break="../config.json")
    astray = replace(bundle, manifest=replace(bundle.manifest, prompt=prompt))
    with pytest.raises(BundleError, match="has no signed file"):
        PictureRows.from_bundle(astray)


def test_models_whose_tiles_follow_each_other_need_no_row(bundle):
    prompt = replace(bundle.manifest.prompt, line_break=None)
    plain = replace(bundle, manifest=replace(bundle.manifest, prompt=prompt))
    assert PictureRows.from_bundle(plain).line_break is None
    assert "line_break" not in plain.manifest.to_json()["prompt"]
    assert bundle.manifest.to_json()["prompt"]["line_break"] == "line_break.f32"
    assert isinstance(bundle.path, Path)
