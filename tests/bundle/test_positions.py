"""Positions along three axes are those of the stock model, for any pictures in any place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from pocketvlm.bundle import PositionGrid
from pocketvlm.runtime.splice import VisualFeatures, lay_out_prompt

IMAGE, MERGE = 7, 2


@pytest.fixture(scope="module")
def stock() -> Qwen2VLModel:
    with torch.device("meta"):
        return Qwen2VLModel(
            Qwen2VLConfig(
                vision_config={"depth": 1, "embed_dim": 8, "hidden_size": 8, "num_heads": 2},
                text_config={
                    "num_hidden_layers": 1,
                    "hidden_size": 8,
                    "intermediate_size": 8,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "vocab_size": 16,
                },
            )
        )


def lay_out(ids, grids, kept=None):
    features = []
    for serial, grid in enumerate(grids):
        indices = np.arange(grid.tokens) if kept is None else np.array(kept)
        features.append(
            VisualFeatures(
                embeds=np.zeros((1, len(indices), 2), np.float32),
                indices=indices[None],
                placeholders=grid.tokens,
                grid=grid,
                serial=serial,
            )
        )
    return lay_out_prompt(ids, features, image_token_id=IMAGE, keeps_positions=True, axes=3)


@settings(deadline=None, max_examples=80)
@given(
    texts=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    sides=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=3),
)
def test_positions_are_those_of_the_stock_model(stock, texts, sides):
    """Also where pictures of one prompt have grids of different sizes."""
    grids = [PositionGrid(rows=rows, columns=columns) for rows, columns in sides]
    ids = [3] * texts[0]
    for grid, length in zip(grids, texts[1:], strict=False):
        ids += [IMAGE] * grid.tokens + [3] * length
    token_ids = torch.tensor([ids])
    expected, delta = stock.get_rope_index(
        token_ids,
        (token_ids == IMAGE).int(),
        torch.tensor([[1, rows * MERGE, columns * MERGE] for rows, columns in sides]).view(-1, 3),
    )
    layout = lay_out(ids, grids)
    np.testing.assert_array_equal(layout.positions, expected[:, 0])
    assert layout.next_position == len(ids) + int(delta[0])
    # An answer continues on all axes at once, after the longest side of the picture.
    grown = layout.extended([4, 5])
    assert grown.positions[:, -2:].tolist() == [[layout.next_position, grown.next_position - 1]] * 3


def test_kept_tokens_stand_where_they_stood_among_all():
    grid = PositionGrid(rows=2, columns=4)
    ids = [3, *[IMAGE] * grid.tokens, 4]
    whole, reduced = lay_out(ids, [grid]), lay_out(ids, [grid], kept=[1, 6])
    assert reduced.next_position == whole.next_position == 6
    assert reduced.positions.tolist() == whole.positions[:, [0, 2, 7, 9]].tolist()
    assert reduced.positions.tolist() == [[0, 1, 1, 5], [0, 1, 2, 5], [0, 2, 3, 5]]
    assert whole.shared_rows(reduced) == 1


@pytest.mark.parametrize("sides", [{"rows": 0, "columns": 1}, {"rows": 1, "columns": 5000}])
def test_a_grid_without_a_possible_size_is_refused(sides):
    with pytest.raises(ValueError, match="1 to 4,096"):
        PositionGrid(**sides)
