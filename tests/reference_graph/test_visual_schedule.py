"""Ever fewer visual rows from layer to layer, against a decoder that hides what was dropped."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.bundle import VisualDrop, VisualSchedule
from pocketvlm.export.torch_runner import TorchRunner
from pocketvlm.reference_graph.forward import (
    DecoderInputs,
    decode_logits,
    decoder_states,
    new_cache,
)
from pocketvlm.reference_graph.visual_schedule import RowsLeft, drop_rows
from tests.reference_graph.oracle import oracle_logits
from tests.reference_graph.test_ended_rows import prompt

TOKENS = 16  # of a picture of the tiny models
ENDING = ((1, 9), (2, 4), (3, 0))


def schedule_of(*drops, ranked_in="layer_before", positions="original"):
    return VisualSchedule(
        drops=tuple(VisualDrop(layers=layers, keep=keep) for layers, keep in drops),
        tokens=TOKENS,
        ranked_in=ranked_in,
        positions=positions,
    )


@pytest.mark.parametrize("drops", [((2, 5),), ((1, 9), (3, 2)), ENDING])
@pytest.mark.parametrize("ranked_in", ["layer_before", "layer_after"])
@pytest.mark.parametrize("positions", ["original", "consecutive"])
@torch.inference_mode()
def test_equals_hiding_the_keys_of_dropped_rows(deep_checkpoint, drops, ranked_in, positions):
    schedule = schedule_of(*drops, ranked_in=ranked_in, positions=positions)
    checkpoint = replace(deep_checkpoint, visual_schedule=schedule)
    inputs = prompt(checkpoint, images=2, batch=2)
    # The first prompt has its answer in the same run, so that another row ranks.
    inputs = replace(inputs, reader=torch.tensor([inputs.embeds.shape[1] - 2, -1]) % 38)
    assert inputs.embeds.shape[1] == 38
    expected, seen = oracle_logits(checkpoint, inputs, schedule)
    found = decode_logits(checkpoint, inputs).double()
    torch.testing.assert_close(found[seen[-1]], expected[seen[-1]], rtol=1e-4, atol=1e-5)
    assert bool((found[~seen[-1]] == 0).all())
    kept = [int(layer[0].sum()) for layer in seen]
    assert kept == [6 + rows for rows in schedule.rows_by_layer(4, 2 * TOKENS)]
    # What is ranked matters: another reader keeps other rows.
    other = oracle_logits(checkpoint, replace(inputs, reader=torch.tensor([1, 1])), schedule)[1]
    assert schedule.drops[0].keep == 0 or any(
        not torch.equal(a, b) for a, b in zip(seen, other, strict=True)
    )


@pytest.mark.parametrize("ranked_in", ["layer_before", "layer_after"])
@pytest.mark.parametrize("positions", ["original", "consecutive"])
@torch.inference_mode()
def test_layers_cache_the_rows_that_they_run_and_answers_go_on_from_there(
    deep_checkpoint, ranked_in, positions
):
    """Token by token on the cache equals the whole at once, whose prompt ends before the answer."""
    schedule = schedule_of((1, 9), (3, 2), ranked_in=ranked_in, positions=positions)
    checkpoint = replace(deep_checkpoint, visual_schedule=schedule)
    inputs = prompt(checkpoint, images=2)
    length, start = inputs.embeds.shape[1], inputs.embeds.shape[1] - 1
    whole = decode_logits(checkpoint, replace(inputs, reader=torch.tensor([start - 1])))
    cache = new_cache(checkpoint)

    def part(columns):
        return DecoderInputs(
            embeds=inputs.embeds[:, columns],
            positions=inputs.positions[:, columns],
            is_visual=inputs.is_visual[:, columns],
            next_position=inputs.next_position,
        )

    pieces = [decode_logits(checkpoint, part(slice(0, start)), cache)]
    held = [cache.length(layer) for layer in range(4)]
    assert held == [5 + rows for rows in schedule.rows_by_layer(4, 2 * TOKENS)]
    pieces.append(decode_logits(checkpoint, part(slice(start, length)), cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_rows_of_earlier_calls_take_part_in_what_ranks(deep_checkpoint):
    """A picture in the second call: kept is what the whole softmax ranks first, the past in it."""
    schedule = schedule_of((1, 3), ranked_in="layer_before")
    checkpoint = replace(deep_checkpoint, visual_schedule=schedule)
    inputs = prompt(checkpoint, images=1)
    cache = new_cache(checkpoint)
    rows = inputs.rows(checkpoint.spec.decoder)
    whole = RowsLeft.of(rows, inputs.is_visual)
    expected = drop_rows(checkpoint, 0, inputs.embeds, whole, after_attention=True)
    first = replace(
        inputs,
        embeds=inputs.embeds[:, :2],
        positions=inputs.positions[:, :2],
        is_visual=inputs.is_visual[:, :2],
    )
    decode_logits(checkpoint, first, cache)
    rest = replace(
        inputs,
        embeds=inputs.embeds[:, 2:],
        positions=inputs.positions[:, 2:],
        is_visual=inputs.is_visual[:, 2:],
    )
    left = RowsLeft.of(rest.rows(checkpoint.spec.decoder, cache), rest.is_visual)
    found = drop_rows(checkpoint, 0, rest.embeds, left, after_attention=True)
    assert torch.equal(found.left.columns + 2, expected.left.columns[:, 2:])


@torch.inference_mode()
def test_prompts_with_unequal_pictures_share_a_batch_without_a_cache(deep_checkpoint):
    checkpoint = replace(deep_checkpoint, visual_schedule=schedule_of(*ENDING[:2]))
    short, long = prompt(checkpoint), prompt(checkpoint, images=2, seed=1)
    rows, length = short.embeds.shape[1], long.embeds.shape[1]
    pad = length - rows
    batch = DecoderInputs(
        embeds=torch.cat([torch.nn.functional.pad(short.embeds, (0, 0, 0, pad)), long.embeds]),
        positions=torch.cat([torch.arange(length)[None], long.positions]),
        is_visual=torch.cat([torch.nn.functional.pad(short.is_visual, (0, pad)), long.is_visual]),
        next_position=torch.tensor([rows, length]),
        reader=torch.tensor([rows - 1, length - 1]),
    )
    columns = torch.tensor([[rows - 1], [length - 1]])
    found = decode_logits(checkpoint, batch, columns=columns)[:, 0]
    for row, single in enumerate((short, long)):
        expected = decode_logits(checkpoint, single, last_only=True)[0, 0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_attention_keeps_more_of_the_answer_than_the_first_rows_would(deep_checkpoint):
    """The naive baseline, averaged over prompts: rows in raster order instead of by rank."""
    checkpoint = replace(deep_checkpoint, visual_schedule=schedule_of((2, 4)))
    gaps = {"ranked": 0.0, "raster": 0.0}
    for seed in range(12):
        inputs = prompt(checkpoint, images=2, seed=seed)
        whole = decoder_states(replace(checkpoint, visual_schedule=None), inputs)[:, -1]
        gaps["ranked"] += float((decoder_states(checkpoint, inputs)[:, -1] - whole).norm())
        attention = RowsLeft.of(inputs.rows(checkpoint.spec.decoder), inputs.is_visual)
        gaps["raster"] += float((_without_last(checkpoint, inputs, attention) - whole).norm())
    assert gaps["ranked"] < gaps["raster"]


def _without_last(checkpoint, inputs, left):
    """The last state where the first 8 visual rows are kept instead."""
    order = inputs.is_visual.cumsum(1)
    dropped = inputs.is_visual & (order > 8)
    hiding = replace(inputs, is_visual=dropped)
    ending = replace(checkpoint, visual_schedule=VisualSchedule.ending(2))
    return decoder_states(ending, hiding)[:, -1]


def test_a_schedule_never_grows_and_fits_its_decoder():
    with pytest.raises(ValueError, match="what was dropped cannot return"):
        schedule_of((1, 4), (2, 9))
    with pytest.raises(ValueError, match="ascending"):
        schedule_of((2, 4), (2, 1))
    with pytest.raises(ValueError, match="what was dropped cannot return"):
        schedule_of((2, TOKENS))
    with pytest.raises(ValueError, match="allowed are 1 to 3"):
        schedule_of((4, 1)).require_depth(4)


schedules = st.builds(
    lambda layers, keeps, ranked_in: schedule_of(
        *zip(sorted(layers), sorted(keeps, reverse=True), strict=False), ranked_in=ranked_in
    ),
    st.sets(st.integers(1, 9), min_size=1, max_size=5),
    st.sets(st.integers(0, TOKENS - 1), min_size=5, max_size=5),
    st.sampled_from(["layer_before", "layer_after"]),
)


@given(schedules, st.integers(0, 500), st.integers(0, 500))
def test_counts_are_nested_and_whole_tiles_are_exact(schedule, rows, more):
    counts = schedule.rows_by_layer(10, rows)
    assert counts[0] == rows
    assert all(after <= before for before, after in pairwise(counts))
    tiles = schedule.rows_by_layer(10, 3 * TOKENS)
    assert tiles[-1] == 3 * schedule.drops[-1].keep
    for stage in range(1, len(schedule.drops) + 1):
        together = schedule.kept(stage, rows + more)
        apart = schedule.kept(stage, rows) + schedule.kept(stage, more)
        assert together <= apart <= together + 1
    for drop in range(len(schedule.drops)):
        places = [
            (layer, after)
            for layer in range(10)
            for after in (False, True)
            if schedule.drop_in(layer, after_attention=after) == drop
        ]
        assert len(places) == 1


calls = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=5)


class CountingRunner(TorchRunner):
    """Counts rows as every runner does, and computes nothing."""

    def __init__(self, schedule):
        super(TorchRunner, self).__init__(capacity=200, schedule=schedule)

    def decode(self, embeds, position_ids, is_visual=None, mutual=None):
        del position_ids, mutual
        self._require_room(embeds.shape[1])
        self._text_rows(embeds.shape[1], is_visual)
        self._advance(embeds.shape[1])
        return np.zeros(1, np.float32)

    def _states(self):
        return {}


@settings(max_examples=60)
@given(schedules, calls, st.data())
def test_a_runner_counts_as_the_schedule_does_and_goes_back_to_whole_calls(schedule, made, data):
    runner, ends, visuals = CountingRunner(schedule), [0], [0]
    for visual, text in made:
        flags = np.array([False] + [True] * visual + [False] * text)
        runner.decode(np.zeros((1, len(flags), 1), np.float32), np.zeros(1), flags)
        ends.append(runner.length)
        visuals.append(visual)
    wanted = data.draw(st.integers(0, runner.length))
    found = runner.truncate(wanted)
    call = next(number for number, end in enumerate(ends) if found <= end)
    inside = ends[call - 1] + 1 < found < ends[call]
    assert found <= wanted
    assert not (schedule.is_ranked and visuals[call] and inside)
    if not schedule.is_ranked:
        assert found == wanted
    if found == ends[call]:
        for stage, held in enumerate(runner.stage_lengths, start=1):
            own = sum(schedule.kept(stage, visual) for visual in visuals[: call + 1])
            assert held == found - sum(visuals[: call + 1]) + own
