"""Rows and positions equal `forward.embed_prompts`, for any pictures in any place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.compress.tokens.baseline.fixed import FixedReducer
from pocketvlm.errors import InputError
from pocketvlm.reference_graph.forward import VisualTokens, embed_prompts
from pocketvlm.runtime.splice import VisualFeatures, embed_rows, lay_out_prompt

FULL = 16


def features(rng, indices, width, serial, full=FULL):
    return VisualFeatures(
        embeds=rng.standard_normal((1, len(indices), width), np.float32),
        indices=np.array([indices]),
        placeholders=full,
        serial=serial,
    )


@settings(deadline=None, max_examples=60)
@given(
    segments=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    kept=st.sets(st.integers(0, FULL - 1), min_size=1),
    policy=st.sampled_from(["original", "consecutive", None]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_equal_to_torch(pairs, kind, segments, kept, policy, seed):
    """Text, picture, text, picture, ..., text; neighbouring pictures included."""
    checkpoint = pairs[kind].checkpoint
    indices = sorted(kept) if policy else list(range(FULL))
    reducer = FixedReducer(tuple(indices), positions=policy) if policy else None
    checkpoint = replace(checkpoint, reducer=reducer)
    spec = checkpoint.spec
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for number, length in enumerate(segments):
        if number:
            ids += [spec.image_token_id] * FULL
        ids += rng.integers(3, 200, length).tolist()
    pictures = [
        features(rng, indices, spec.decoder.hidden_size, serial)
        for serial in range(len(segments) - 1)
    ]
    if not ids:
        return
    visual = None
    if pictures:
        visual = VisualTokens(
            embeds=torch.from_numpy(np.concatenate([p.embeds for p in pictures])),
            indices=torch.from_numpy(np.concatenate([p.indices for p in pictures])),
        )
    with torch.inference_mode():
        expected = embed_prompts(checkpoint, torch.tensor([ids]), visual)
        embedding = checkpoint.model.get_submodule(spec.decoder.embedding)

        def embed(token_ids):
            return embedding(torch.tensor([list(token_ids)])).numpy()

        layout = lay_out_prompt(
            ids,
            pictures,
            image_token_id=spec.image_token_id,
            keeps_positions=policy != "consecutive",
        )
        start = seed % len(layout.codes)
        rows = embed_rows(layout, pictures, embed, start=start)
    assert np.array_equal(layout.positions[0], expected.positions[0])
    assert np.array_equal(layout.is_visual, expected.is_visual[0])
    assert layout.next_position == int(expected.next_position)
    assert np.array_equal(rows, expected.embeds.numpy()[:, start:])


def lay_out(ids, pictures=(), *, keeps_positions=True):
    return lay_out_prompt(ids, pictures, image_token_id=9, keeps_positions=keeps_positions)


def test_shared_rows_end_where_token_picture_or_position_differ():
    rng = np.random.default_rng(0)
    one, two = (features(rng, [0, 2], 4, serial, 3) for serial in (1, 2))
    base = lay_out([1, 9, 9, 9, 2, 3], [one])
    assert base.shared_rows(base) == 5
    assert base.shared_rows(lay_out([1, 9, 9, 9, 2, 4], [one])) == 4
    assert base.shared_rows(lay_out([1, 9, 9, 9, 2, 3], [two])) == 1
    assert base.shared_rows(lay_out([1, 9, 9, 9], [one])) == 3
    assert base.shared_rows(lay_out([2, 1])) == 0
    # The same tokens under the other policy stand at other positions.
    assert base.shared_rows(lay_out([1, 9, 9, 9, 2, 3], [one], keeps_positions=False)) == 2


def test_generated_tokens_continue_the_positions():
    grown = lay_out([1, 2]).extended([5, 6])
    whole = lay_out([1, 2, 5, 6])
    assert whole.shared_rows(grown) == 4
    assert grown.next_position == whole.next_position
    assert grown.first(3).shared_rows(whole) == 3


@pytest.mark.parametrize("ids", [[1, 9, 9, 2], [1, 9, 9, 9, 9], [1, 2], [9, 9, 9, 9, 9, 9]])
def test_placeholders_that_do_not_match_the_pictures_are_an_error(ids):
    picture = features(np.random.default_rng(0), [0, 1], 4, 0, 3)
    with pytest.raises(InputError, match="its pictures need 3 in 1 runs"):
        lay_out(ids, [picture])
