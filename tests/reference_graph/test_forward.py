"""The torch definition of the phone's forward pass against transformers' own forward."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from pocketvlm.graph.tensor_ops import merge_patches
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.processor import user_message
from pocketvlm.reference_graph.forward import (
    DecoderInputs,
    decode_logits,
    embed_prompts,
    encode_images,
    greedy_generate,
    reduce_features,
)
from pocketvlm.reference_graph.tower_states import TowerState
from tests.stock import stock_of


class KeepEvery(TokenReducer):
    """Every other token."""

    def forward(self, inputs):
        index = torch.arange(0, 2 * self.keep, 2).expand(inputs.features.shape[0], -1)
        return inputs.features[:, 0 : 2 * self.keep : 2], index


def pictures(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)) for _ in range(count)]


def prepared(checkpoint, count=2):
    processor = checkpoint.processor
    pixels = processor.pixels(pictures(count))
    ids = torch.tensor([processor.encode([user_message("what is it?")])] * count)
    return pixels, ids


def stock_model(path):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def test_logits_and_answers_equal_the_stock_model(tiny_checkpoint, tiny_path):
    pixels, ids = prepared(tiny_checkpoint)
    inputs = embed_prompts(tiny_checkpoint, ids, encode_images(tiny_checkpoint, pixels))
    stock = stock_model(tiny_path)
    images = pixels if tiny_checkpoint.spec.family == "llava" else pixels[:, None]
    expected = stock(input_ids=ids, pixel_values=images).logits
    torch.testing.assert_close(decode_logits(tiny_checkpoint, inputs), expected)
    generated = stock.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=images,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )
    answers = greedy_generate(tiny_checkpoint, inputs, max_new_tokens=6)
    assert answers == generated[:, ids.shape[1] :].tolist()


@torch.inference_mode()
def test_a_reducer_is_given_the_attention_of_the_feature_block(tiny_checkpoint, tiny_path):
    spec = tiny_checkpoint.spec
    given = []

    class Recorder(TokenReducer):
        def forward(self, inputs):
            given.append(inputs)
            return inputs.features[:, :1], torch.zeros(len(inputs.features), 1, dtype=torch.int64)

    checkpoint = replace(tiny_checkpoint, reducer=Recorder(keep=1, positions="original"))
    hidden = torch.randn(1, 5, spec.tower.hidden_size)
    entering = {spec.tower.feature_block: TowerState(hidden=hidden)}
    reduce_features(checkpoint, torch.randn(1, 4, 8), entering)
    (inputs,) = given
    weights = functional.softmax(inputs.queries @ inputs.keys.transpose(-1, -2), dim=-1)
    name = spec.tower.blocks[spec.tower.feature_block].module
    block = stock_model(tiny_path).get_submodule(name)
    normed = block.layer_norm1(hidden)
    values = block.self_attn.v_proj(normed).view(1, 5, spec.tower.heads, -1).transpose(1, 2)
    mixed = (weights @ values).transpose(1, 2).reshape(1, 5, -1)
    expected, _ = block.self_attn(normed, attention_mask=None)
    torch.testing.assert_close(block.self_attn.out_proj(mixed), expected)


def test_merging_puts_each_square_of_patches_into_one_token():
    side, width, factor = 4, 3, 2
    features = torch.arange(side * side * width, dtype=torch.float32).view(1, side * side, width)
    merged = merge_patches(features, factor, side)
    grid = features.view(side, side, width)
    for row in range(2):
        for column in range(2):
            square = grid[row * 2 : row * 2 + 2, column * 2 : column * 2 + 2].reshape(-1)
            assert torch.equal(merged[0, row * 2 + column], square)


@torch.inference_mode()
@pytest.mark.parametrize("positions", ["original", "consecutive"])
def test_reduced_tokens_enter_the_decoder_at_the_right_positions(tiny_checkpoint, positions):
    checkpoint = replace(tiny_checkpoint, reducer=KeepEvery(keep=8, positions=positions))
    pixels, ids = prepared(checkpoint)
    visual = encode_images(checkpoint, pixels)
    inputs = embed_prompts(checkpoint, ids, visual)
    start = ids[0].tolist().index(checkpoint.spec.image_token_id)
    text_after = ids.shape[1] - start - 16
    if positions == "original":
        seen = [*range(start), *range(start, start + 16, 2), *range(start + 16, ids.shape[1])]
        following = ids.shape[1]
    else:
        seen = list(range(start + 8 + text_after))
        following = start + 8 + text_after
    assert inputs.positions[0].tolist() == seen
    assert inputs.next_position.tolist() == [following] * 2
    assert inputs.is_visual[0].nonzero().flatten().tolist() == list(range(start, start + 8))
    full = encode_images(replace(checkpoint, reducer=None), pixels)
    torch.testing.assert_close(visual.embeds, full.embeds[:, ::2])


@torch.inference_mode()
def test_dropping_tokens_equals_masking_them(tiny_checkpoint):
    """A mask over the full sequence is an independent route to the same logits."""
    checkpoint = replace(tiny_checkpoint, reducer=KeepEvery(keep=8, positions="original"))
    pixels, ids = prepared(checkpoint, 1)
    reduced = decode_logits(
        checkpoint, embed_prompts(checkpoint, ids, encode_images(checkpoint, pixels))
    )
    whole = replace(checkpoint, reducer=None)
    inputs = embed_prompts(whole, ids, encode_images(whole, pixels))
    start = ids[0].tolist().index(checkpoint.spec.image_token_id)
    length = ids.shape[1]
    hidden_columns = [start + offset for offset in range(1, 16, 2)]
    mask = torch.full((length, length), 0.0).masked_fill(
        torch.ones(length, length).triu(1).bool(), float("-inf")
    )
    mask[:, hidden_columns] = float("-inf")
    mask[hidden_columns, :] = 0.0  # rows that nobody reads, kept finite
    stock = stock_of(checkpoint)
    output = stock.get_submodule(checkpoint.spec.decoder.prefix)(
        inputs_embeds=inputs.embeds,
        position_ids=inputs.positions,
        attention_mask=mask[None, None],
        use_cache=False,
    )
    logits = stock.lm_head(output.last_hidden_state)
    kept = [column for column in range(length) if column not in hidden_columns]
    torch.testing.assert_close(reduced, logits[:, kept], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_generation_with_a_cache_equals_running_the_whole_sequence_anew(tiny_checkpoint):
    checkpoint = replace(tiny_checkpoint, reducer=KeepEvery(keep=8, positions="original"))
    pixels, ids = prepared(checkpoint, 1)
    inputs = embed_prompts(checkpoint, ids, encode_images(checkpoint, pixels))
    (answer,) = greedy_generate(checkpoint, inputs, max_new_tokens=5)
    embedding = checkpoint.model.get_submodule(checkpoint.spec.decoder.embedding)
    for step in range(5):
        extra = torch.tensor([answer[:step]], dtype=torch.long)
        longer = DecoderInputs(
            embeds=torch.cat([inputs.embeds, embedding(extra)], dim=1),
            positions=torch.cat(
                [inputs.positions, inputs.next_position + torch.arange(step)[None]], 1
            ),
            is_visual=inputs.is_visual,
            next_position=inputs.next_position + step,
        )
        assert int(decode_logits(checkpoint, longer, last_only=True).argmax()) == answer[step]


def test_rows_with_images_in_different_columns_are_refused(tiny_checkpoint):
    _, ids = prepared(tiny_checkpoint)
    shifted = ids.clone()
    shifted[1] = shifted[1].roll(1)
    with pytest.raises(ValueError, match="same columns"):
        embed_prompts(tiny_checkpoint, shifted, None)
