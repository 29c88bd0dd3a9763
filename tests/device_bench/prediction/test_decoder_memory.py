"""What a call of the decoder takes is counted by its rows, its heads and its widest product."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pocketvlm.bundle import VisualDrop, VisualSchedule
from pocketvlm.device_bench.prediction.decoder_memory import DecoderMemory
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.plan_memory import decoder_memory, predict_memory
from pocketvlm.reference.shapes import load_shape
from pocketvlm.stages import PlanState


def state_of(name: str) -> PlanState:
    return PlanState.of(load_shape(name).spec)


def test_scores_are_made_for_all_that_the_cache_has_room_for() -> None:
    memory = DecoderMemory(heads=9, row_bytes=1000)
    assert memory.call_bytes(100, 2048) == 100 * (1000 + 4 * 9 * 2048)
    assert memory.call_bytes(761, 2048) == 128 * (1000 + 4 * 9 * 2048)  # in pieces
    whole = replace(memory, takes_pieces=False)
    assert whole.call_bytes(761, 2048) == 761 * (1000 + 4 * 9 * 2048)


def test_the_widest_rows_are_those_of_gate_and_up_or_of_attention() -> None:
    decoder = state_of("smolvlm-256m").spec.decoder
    memory = decoder_memory(state_of("smolvlm-256m"))
    assert (memory.heads, memory.takes_pieces) == (decoder.heads, True)
    assert memory.row_bytes == 2 * 4 * (576 + 2 * 1536)


def test_a_schedule_and_rows_that_see_later_ones_are_not_parted() -> None:
    state = state_of("smolvlm-256m")
    schedule = VisualSchedule(drops=(VisualDrop(layers=3, keep=8),), tokens=64)
    assert not decoder_memory(replace(state, visual_schedule=schedule)).takes_pieces
    decoder = replace(state.spec.decoder, mutual_rows="prompt")
    seeing = replace(state, spec=replace(state.spec, decoder=decoder))
    assert not decoder_memory(seeing).takes_pieces


def test_a_prompt_counts_where_it_takes_more_than_the_tower() -> None:
    planned = predict_memory(state_of("llava-interleave-0.5b"), (ToOnnx(),))
    rest = planned.weight_bytes + planned.cache_bytes + planned.runtime_bytes
    assert planned.prompt_bytes < planned.activation_bytes
    assert planned.total_bytes == rest + planned.activation_bytes
    longer = replace(planned, prompt_bytes=2 * planned.activation_bytes)
    assert longer.total_bytes == rest + 2 * planned.activation_bytes


@pytest.mark.parametrize("fields", [{"heads": -1}, {"row_bytes": 2**41}])
def test_impossible_counts_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be 0 to"):
        DecoderMemory(**{"heads": 1, "row_bytes": 1, **fields})
