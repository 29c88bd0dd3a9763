"""Blocks of real bundles: turns, pictures, sustained answers, events."""

from __future__ import annotations

import base64
import io
import itertools
from pathlib import Path

import pytest
from PIL import Image

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.block import AnswerTimes, Block, SensorSample
from pocketvlm.device_bench.protocol import (
    AnswerEvent,
    BlockJob,
    LoadedEvent,
    Turn,
    parse_event,
    write_event,
)
from pocketvlm.device_bench.runner.measure import measure_block
from pocketvlm.device_bench.workload import draw_picture
from pocketvlm.errors import InputError, UnsupportedError
from pocketvlm.json_io import decode, encode
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.engines import open_engine
from pocketvlm.runtime.vision import VisionChoice

PICTURES = (draw_picture(64), draw_picture(96))
QUESTIONS = ("What is it?", "And here?", "Why?")


def conversation_job(bundle, **changes):
    turns = tuple(
        Turn(text=text, pictures=shown)
        for text, shown in zip(QUESTIONS, ((0,), (1,), ()), strict=True)
    )
    fields = {
        "bundle": str(bundle),
        "runtime": "onnx",
        "turns": turns,
        "new_tokens": 5,
        "pictures": tuple(base64.b64encode(picture).decode() for picture in PICTURES),
        "warm_ups": 2,
        "answers": 2,
        "sustained_s": 0.2,
    }
    return BlockJob(**{**fields, **changes})


@pytest.fixture(scope="module")
def measured(tiny_bundle):
    events = []
    block = measure_block(conversation_job(tiny_bundle), 1, on_event=events.append)
    return block, events


def test_the_vision_graph_of_the_job_sees_the_pictures(graphs_bundle):
    def visual_tokens(**asked):
        vision = VisionChoice(**asked)
        job = conversation_job(
            graphs_bundle, warm_ups=1, answers=1, sustained_s=None, vision=vision
        )
        return measure_block(job, 1).prompt.visual_tokens

    assert visual_tokens() == 8
    assert visual_tokens(visual_tokens=4) == 4
    assert visual_tokens(visual_tokens=3) == 3
    assert visual_tokens(resolution=(96, 32)) == 8


def check_conversation(block, job):
    """Later turns extend the cache, and all say what an app would be told."""
    bundle = Bundle.open(Path(job.bundle))
    talk = Conversation(bundle, runner=open_engine(bundle, "onnx", threads=1))
    for turn, token_ids in zip(job.turns, block.token_ids, strict=True):
        shown = [Image.open(io.BytesIO(PICTURES[index])) for index in turn.pictures]
        stream = talk.stream(turn.text, shown, max_new_tokens=5, ignore_end=True)
        for _ in stream:
            pass
        assert talk.answers[-1].token_ids == token_ids
    turns = [block.answers[0], *(answers[0] for answers in block.later_turns)]
    assert turns[0].reused_tokens == 0
    for earlier, later in itertools.pairwise(turns):
        assert later.reused_tokens >= earlier.reused_tokens + earlier.prompt_tokens
    for turn, times in zip(job.turns, turns, strict=True):
        assert (times.vision_ms is not None) == (times.preprocess_ms is not None)
        assert (times.vision_ms is not None) == bool(turn.pictures)


def test_every_turn_of_a_conversation_is_measured(measured, tiny_bundle):
    block, _ = measured
    assert [len(turns) for turns in block.later_turns] == [2, 2]
    assert block.is_repeatable
    check_conversation(block, conversation_job(tiny_bundle))
    assert decode(Block, encode(block)) == block


def test_events_come_in_the_order_in_which_things_happen(measured):
    block, events = measured
    kinds = [
        (type(event), getattr(event, "kind", None)) for event in events if event is not events[0]
    ]
    assert isinstance(events[0], SensorSample)
    assert kinds[0] == (LoadedEvent, None)
    answers = [event for event in events if isinstance(event, AnswerEvent)]
    assert [event.turn for event in answers] == list(
        itertools.islice(itertools.cycle(range(3)), len(answers))
    )
    names = [name for name, _ in itertools.groupby(event.kind for event in answers)]
    assert names == ["cold", "warm_up", "measured", "sustained"]
    times = [event.at_ms for event in events if not isinstance(event, LoadedEvent)]
    assert times == sorted(times)
    assert [event for event in events if isinstance(event, SensorSample)] == list(block.sensors)
    assert all(parse_event(write_event(event)) == event for event in events)
    sustained = [event for event in answers if event.kind == "sustained"]
    assert len(sustained) == len(block.sustained) >= 3
    assert block.sustained[-1].at_s >= 0.2
    assert block.sustained_at_ms >= [e.at_ms for e in answers if e.kind == "measured"][-1]
    assert block.sustained[-1].ttft_user_ms == sustained[-1].times.ttft_user_ms


def test_memory_is_told_by_phase(measured):
    memory = measured[0].memory
    assert memory.counter in ("VmHWM", "phys_footprint")
    assert memory.before_load_rss_bytes > 10_000_000
    # What other tests left in this process may be freed meanwhile, so peaks have only one bound.
    for phase in (memory.peak_prefill_rss_bytes, memory.peak_decode_rss_bytes):
        assert phase is None or 0 < phase <= memory.peak_rss_bytes
    assert memory.after_rss_bytes <= memory.peak_rss_bytes


def test_an_answer_that_may_end_ends(tiny_bundle):
    job = conversation_job(
        tiny_bundle, ignore_eos=False, turns=(Turn(text="x"),), sustained_s=None, warm_ups=1
    )
    block = measure_block(job, 1)
    (times,) = {type(answer) for answer in block.answers}
    assert times is AnswerTimes
    assert all(1 <= answer.new_tokens <= 5 for answer in block.answers)
    assert all(len(answer.sample_ms) == answer.new_tokens for answer in block.answers)


def test_what_does_not_fit_is_refused(tiny_bundle):
    with pytest.raises(InputError, match=r"turn 1 ended after \d+ of 600 tokens"):
        measure_block(conversation_job(tiny_bundle, turns=(Turn(text="x"),), new_tokens=600), 1)
    with pytest.raises(InputError, match="runtime is 'tflite'"):
        measure_block(conversation_job(tiny_bundle, runtime="tflite"), 1)
    with pytest.raises(UnsupportedError, match="Core ML runs on Apple machines alone"):
        measure_block(conversation_job(tiny_bundle, runtime="coreml"), 1)
