"""What the training of `benchmarks/real_vlm.py` stands on, held to the stock model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.low_rank import LowRank, merge, widen
from benchmarks.real_vlm_scenes import Chat, draw_batch, draw_scenes, name_cells, pixels_of
from pocketvlm.reference import reference_model_path
from pocketvlm.reference.forward import look
from pocketvlm.reference.packing import choose_questions

LENGTH = 160


@pytest.fixture(scope="module")
def model():
    folder = reference_model_path("pocket-smol")
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(reference_model_path("pocket-smol"))


@torch.no_grad()
def test_a_question_in_a_pack_is_answered_as_alone(model, processor):
    """Two scenes; each question's logits are those of the stock model on its prompt by itself."""
    chat = Chat(processor)
    batch = draw_batch(chat, seed=0, first=8, count=2, length=LENGTH)
    states = model.model.text_model.embed_tokens(batch.tokens)
    places = batch.tokens == chat.image_id
    states = states.masked_scatter(places[..., None], look(model, batch.pixels).tokens)
    packed = model.model.text_model(
        inputs_embeds=states, attention_mask=batch.seen, position_ids=batch.positions
    ).last_hidden_state
    begins, compared = len(chat.prefix), 0
    for row, scene in enumerate(draw_scenes(0, 8, 2)):
        end = begins
        for question in choose_questions(scene, np.random.default_rng((0, 8 + row)), 24):
            _, answer = chat.turn(question.text, question.answer)
            ids = torch.tensor([[*chat.ask(processor, question.text), *answer]])
            stop = end + ids.shape[1] - begins
            if stop > LENGTH:
                continue
            alone = model.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=batch.pixels[row][None, None],
            ).last_hidden_state[0]
            torch.testing.assert_close(packed[row, end:stop], alone[begins:], rtol=1e-3, atol=1e-3)
            assert batch.targets[row, stop - len(answer) - 1 : stop - 1].tolist() == answer
            end, compared = stop, compared + 1
    assert compared >= 6
    assert int((batch.targets == chat.end_id).sum()) == compared


@torch.no_grad()
def test_a_connector_by_least_squares_names_what_cells_show(model, processor):
    """A cell is four patches wide, as the checkpoint with a real decoder folds them."""
    chat, scenes = Chat(processor), draw_scenes(0, 0, 192)
    tower, table = model.model.vision_model, model.model.text_model.embed_tokens.weight
    states = tower(pixels_of(scenes)).last_hidden_state
    cells = model.model.connector.pixel_shuffle(states, 4)
    matrix, missed = name_cells(chat, cells, scenes, table)
    assert matrix.shape == (table.shape[1], cells.shape[2])
    assert missed < 0.01
    # Cells of other scenes say as little as their places do.
    _, elsewhere = name_cells(chat, cells.roll(1, dims=0), scenes, table)
    assert elsewhere > 5 * missed


def test_a_merged_update_says_the_same():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    before = layers(torch.eye(8))
    parameters = widen(layers, rank=2)
    torch.testing.assert_close(layers(torch.eye(8)), before)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_()
    updated = layers(torch.eye(8))
    assert not torch.allclose(updated, before)
    assert sum(isinstance(layer, LowRank) for layer in layers) == 2
    merge(layers)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(layers(torch.eye(8)), updated)
