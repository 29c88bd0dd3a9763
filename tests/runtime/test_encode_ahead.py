"""Pictures that are encoded before anybody asks: the same answers, and no wait for the tower."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketvlm.bundle import Bundle
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import InputError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.vision import VisionChoice

from .conftest import CountingRunner, Pair, noise


def talk_of(bundle: Bundle) -> tuple[Conversation, CountingRunner]:
    runner = CountingRunner(bundle, threads=1)
    return Conversation(bundle, runner=runner), runner


def test_answers_are_the_same_without_the_tower(pair: Pair) -> None:
    plain = Conversation(pair.bundle)
    talk, runner = talk_of(pair.bundle)
    ahead = talk.encode_ahead(noise(1))
    seen = runner.tiles
    first = talk.ask("One", ahead, max_new_tokens=6)
    assert runner.tiles == seen > 0
    waited = plain.ask("One", noise(1), max_new_tokens=6).timings
    assert first.timings.vision_ms == 0 < waited.vision_ms
    # Another picture and the first one again, in a later turn.
    second = talk.ask("Two", [noise(2), ahead], max_new_tokens=6)
    assert runner.tiles == 2 * seen
    plain.ask("Two", [noise(2), noise(1)], max_new_tokens=6)
    assert [answer.token_ids for answer in talk.answers] == [
        answer.token_ids for answer in plain.answers
    ]
    assert second.timings.reused_tokens == plain.answers[-1].timings.reused_tokens > 0


def test_a_turn_that_does_not_use_it_is_not_changed(llava: Pair) -> None:
    plain, (talk, _) = Conversation(llava.bundle), talk_of(llava.bundle)
    for prompt, picture in (("One", noise(1)), ("Two", None)):
        talk.encode_ahead(noise(3))
        found = talk.ask(prompt, picture, max_new_tokens=6)
        expected = plain.ask(prompt, picture, max_new_tokens=6)
        assert found.token_ids == expected.token_ids
        assert found.timings.reused_tokens == expected.timings.reused_tokens


def test_it_belongs_to_its_conversation_and_graph(llava: Pair) -> None:
    talk, other = Conversation(llava.bundle), Conversation(llava.bundle)
    ahead = talk.encode_ahead(noise(1))
    with pytest.raises(InputError, match="encoded ahead by another conversation"):
        other.ask("One", ahead)
    with pytest.raises(InputError, match="another graph than for 3 visual tokens"):
        talk.ask("One", ahead, vision=VisionChoice(visual_tokens=3))
    with pytest.raises(InputError, match="no vision graph for 3 visual tokens"):
        talk.encode_ahead(noise(1), vision=VisionChoice(visual_tokens=3))
    talk.ask("One", ahead, max_new_tokens=1)


def test_a_picture_that_is_cut_otherwise_beside_another_is_encoded_again(tmp_path: Path) -> None:
    """LLaVA-OneVision cuts the only picture of a conversation, and leaves several whole."""
    write_tiny_model("llava-onevision", tmp_path / "model")
    checkpoint = Checkpoint.load(tmp_path / "model")
    write_graphs(checkpoint, (ToOnnx(),), tmp_path / "bundle", "", RunContext(threads=1))
    bundle = Bundle.open(tmp_path / "bundle")
    wide = noise(1).resize((120, 50))
    plain, (talk, runner) = Conversation(bundle), talk_of(bundle)
    ahead = talk.encode_ahead(wide)
    alone = runner.tiles
    assert alone > 1
    found = talk.ask("Which?", [ahead, noise(2)], max_new_tokens=6)
    assert runner.tiles > alone + 1
    assert found.token_ids == plain.ask("Which?", [wide, noise(2)], max_new_tokens=6).token_ids
