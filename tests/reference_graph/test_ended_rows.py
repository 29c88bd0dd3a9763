"""Visual tokens that end before the last layer, against a decoder that masks them there."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocketvlm.bundle import VisualSchedule
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CheckpointError
from pocketvlm.files.signed_folder import sign_document
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.reference_graph.decoder_rows import text_columns
from pocketvlm.reference_graph.forward import (
    DecoderInputs,
    VisualTokens,
    decode_logits,
    embed_prompts,
    greedy_generate,
    new_cache,
)
from pocketvlm.weights.kv_cache import KVCacheScales
from tests.reference_graph.oracle import oracle_logits


class KeepEvery(TokenReducer):
    """Every third token, which leaves gaps among the positions."""

    def forward(self, inputs):
        index = torch.arange(0, 3 * self.keep, 3).expand(inputs.features.shape[0], -1)
        return inputs.features[:, 0 : 3 * self.keep : 3], index


def prompt(checkpoint, *, images=1, batch=1, seed=0):
    """Random visual tokens before, between and after text."""
    spec = checkpoint.spec
    torch.manual_seed(seed)
    kept = spec.visual_tokens if checkpoint.reducer is None else checkpoint.reducer.keep
    run = [spec.image_token_id] * spec.visual_tokens
    ids = [5, 6]
    for image in range(images):
        ids += [*run, 7 + image, 9]
    every = torch.arange(spec.visual_tokens)
    indices = (every if checkpoint.reducer is None else every[::3][:kept]).expand(
        batch * images, -1
    )
    embeds = torch.randn(batch * images, kept, spec.decoder.hidden_size)
    token_ids = torch.tensor([ids] * batch)
    token_ids[:, 0] = torch.arange(batch) + 3
    with torch.inference_mode():
        return embed_prompts(checkpoint, token_ids, VisualTokens(embeds=embeds, indices=indices))


def masked_logits(checkpoint, inputs, visual_layers):
    """Logits of a decoder that hides visual keys in the late layers."""
    depth = checkpoint.spec.decoder.depth
    schedule = VisualSchedule.ending(visual_layers) if visual_layers < depth else None
    return oracle_logits(checkpoint, inputs, schedule)[0]


@pytest.mark.parametrize("visual_layers", [1, 3])
@pytest.mark.parametrize("reduced", [False, True])
@torch.inference_mode()
def test_equals_masking_visual_keys_in_late_layers(deep_checkpoint, visual_layers, reduced):
    reducer = KeepEvery(keep=4, positions="original") if reduced else None
    schedule = VisualSchedule.ending(visual_layers)
    checkpoint = replace(deep_checkpoint, visual_schedule=schedule, reducer=reducer)
    inputs = prompt(checkpoint, images=2, batch=2)
    found = decode_logits(checkpoint, inputs).double()
    expected = masked_logits(checkpoint, inputs, visual_layers)
    text = ~inputs.is_visual
    torch.testing.assert_close(found[text], expected[text], rtol=1e-4, atol=1e-5)
    assert bool((found[~text] == 0).all())
    # The reference itself: nothing is masked where no layer is late, as in the stock model.
    whole = decode_logits(replace(checkpoint, visual_schedule=None), inputs).double()
    stock = masked_logits(checkpoint, inputs, checkpoint.spec.decoder.depth)
    torch.testing.assert_close(whole, stock, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[text], expected[text], rtol=1e-2, atol=1e-3)


@torch.inference_mode()
def test_the_cache_holds_text_alone_behind_the_visual_layers(deep_checkpoint):
    checkpoint = replace(deep_checkpoint, visual_schedule=VisualSchedule.ending(1))
    inputs = prompt(checkpoint, images=2)
    cache = new_cache(checkpoint)
    whole = decode_logits(checkpoint, inputs)
    last = decode_logits(checkpoint, inputs, cache, last_only=True)
    torch.testing.assert_close(last[:, 0], whole[:, -1])
    rows, text = inputs.embeds.shape[1], int((~inputs.is_visual).sum())
    depth = checkpoint.spec.decoder.depth
    assert [cache.length(layer) for layer in range(depth)] == [rows] + [text] * (depth - 1)


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("cuts", [(2,), (1, 5, 9), (2, 18, 21, 22)])
@torch.inference_mode()
def test_a_prompt_may_come_in_pieces(deep_checkpoint, grid, cuts):
    checkpoint = replace(deep_checkpoint, visual_schedule=VisualSchedule.ending(2))
    if grid:
        decoder = checkpoint.spec.decoder
        scales = torch.full((decoder.depth, decoder.kv_heads, decoder.head_dim), 0.02)
        checkpoint = replace(checkpoint, cache_grid=KVCacheScales(keys=scales, values=scales))
    inputs = prompt(checkpoint, images=2)
    whole = decode_logits(checkpoint, inputs)
    cache, pieces = new_cache(checkpoint), []
    edges = [0, *cuts, inputs.embeds.shape[1]]
    for start, end in pairwise(edges):
        part = DecoderInputs(
            embeds=inputs.embeds[:, start:end],
            positions=inputs.positions[:, start:end],
            is_visual=inputs.is_visual[:, start:end],
            next_position=inputs.next_position,
        )
        pieces.append(decode_logits(checkpoint, part, cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_generation_equals_starting_over(deep_checkpoint):
    checkpoint = replace(deep_checkpoint, visual_schedule=VisualSchedule.ending(1))
    inputs = prompt(checkpoint, batch=2)
    answers = greedy_generate(checkpoint, inputs, max_new_tokens=4)
    embedding = checkpoint.model.get_submodule(checkpoint.spec.decoder.embedding)
    for row, answer in enumerate(answers):
        known: list[int] = []
        for token in answer:
            places = inputs.next_position[row] + torch.arange(len(known))
            longer = DecoderInputs(
                embeds=torch.cat(
                    [inputs.embeds[[row]], embedding(torch.tensor([known]).long())], 1
                ),
                positions=torch.cat([inputs.positions[[row]], places[None]], dim=1),
                is_visual=torch.cat(
                    [inputs.is_visual[[row]], torch.zeros(1, len(known), dtype=torch.bool)], dim=1
                ),
                next_position=places,
            )
            logits = masked_logits(checkpoint, longer, 1)
            assert int(logits[0, -1].argmax()) == token
            known.append(token)


@torch.inference_mode()
def test_prompts_with_images_in_different_columns_share_a_batch_without_a_cache(deep_checkpoint):
    checkpoint = replace(deep_checkpoint, visual_schedule=VisualSchedule.ending(1))
    short, long = prompt(checkpoint), prompt(checkpoint, images=2, seed=1)
    length, width = long.embeds.shape[1:]
    rows = short.embeds.shape[1]
    embeds = torch.zeros(2, length, width)
    embeds[0, :rows], embeds[1] = short.embeds[0], long.embeds[0]
    is_visual = torch.zeros(2, length, dtype=torch.bool)
    is_visual[0, :rows], is_visual[1] = short.is_visual[0], long.is_visual[0]
    batch = DecoderInputs(
        embeds=embeds,
        positions=torch.cat([torch.arange(length)[None], long.positions]),
        is_visual=is_visual,
        next_position=torch.tensor([rows, length]),
    )
    assert len(set(is_visual.sum(1).tolist())) == 2
    columns = torch.tensor([[rows - 1], [length - 1]])
    found = decode_logits(checkpoint, batch, columns=columns)[:, 0]
    for row, single in enumerate((short, long)):
        expected = decode_logits(checkpoint, single, last_only=True)[0, 0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="equally many rows left"):
        decode_logits(checkpoint, batch, new_cache(checkpoint))


def test_a_visual_row_answers_nothing(deep_checkpoint):
    checkpoint = replace(deep_checkpoint, visual_schedule=VisualSchedule.ending(1))
    inputs = replace(prompt(checkpoint), is_visual=torch.ones(1, 1, dtype=torch.bool).expand(1, 20))
    with pytest.raises(ValueError, match="last column is visual"):
        decode_logits(checkpoint, inputs, last_only=True)


def test_gradients_reach_the_image_and_stay_finite(deep_checkpoint):
    checkpoint = replace(deep_checkpoint, visual_schedule=VisualSchedule.ending(1))
    inputs = prompt(checkpoint)
    embeds = inputs.embeds.clone().requires_grad_()
    decode_logits(checkpoint, replace(inputs, embeds=embeds)).square().sum().backward()
    assert bool(torch.isfinite(embeds.grad).all())
    assert bool((embeds.grad[inputs.is_visual].abs().sum(-1) > 0).all())


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3))
def test_columns_of_text_are_all_there_in_order(flags):
    is_visual = torch.tensor(flags)
    columns = text_columns(is_visual)
    for row, found in zip(is_visual, columns, strict=True):
        own = (~row).nonzero().flatten()
        assert torch.equal(found[: len(own)], own)


def test_a_checkpoint_saves_and_loads_how_deep_visual_tokens_run(deep_checkpoint, tmp_path):
    replace(deep_checkpoint, visual_schedule=VisualSchedule.ending(2)).save(tmp_path / "saved")
    assert Checkpoint.load(tmp_path / "saved").visual_schedule == VisualSchedule.ending(2)
    deep_checkpoint.save(tmp_path / "whole")
    assert Checkpoint.load(tmp_path / "whole").visual_schedule is None
    manifest = tmp_path / "saved" / "pocketvlm.json"
    document = json.loads(manifest.read_text())
    for wrong in (0, deep_checkpoint.spec.decoder.depth, "2"):
        drops = [{"layers": wrong, "keep": 0}]
        changed = {**document, "visual_schedule": {**document["visual_schedule"], "drops": drops}}
        manifest.write_text(json.dumps(sign_document(changed)))
        with pytest.raises(CheckpointError, match=r"(allowed are 1|must be a whole number)"):
            Checkpoint.load(tmp_path / "saved")


def test_layers_are_removed_before_visual_tokens_are_cut(deep_checkpoint):
    fewer = json.loads(json.dumps(deep_checkpoint.config))
    fewer["text_config"]["num_hidden_layers"] = 3
    with pytest.raises(CheckpointError, match="remove layers before drop_tokens"):
        replace(deep_checkpoint, visual_schedule=VisualSchedule.ending(2)).rebuild(fewer, {}, {})
