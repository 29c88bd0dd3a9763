"""Turns as a device without a chat template is sent them."""

from __future__ import annotations

from pathlib import Path

from pocketvlm.bundle import Bundle
from pocketvlm.device_bench.controller.prompts import render_turns
from pocketvlm.device_bench.protocol import ANSWER_MARK, Turn
from pocketvlm.runtime.text import TextCodec, assistant_message, user_message

TURNS = (Turn(text="what is it?", pictures=(0, 1)), Turn(text="and <image> there?"))


def test_a_later_turn_with_the_answer_in_its_place_is_the_conversation(tiny_bundle: Path) -> None:
    codec = TextCodec.from_bundle(Bundle.open(tiny_bundle))
    first, second = render_turns(codec, TURNS)
    question = user_message("what is it?", images=2)
    assert first.rendered == codec.prompts.render([question])
    said = [question, assistant_message("a disc"), user_message("and <image> there?")]
    assert second.rendered is not None
    assert second.rendered.count(ANSWER_MARK) == 1
    assert second.rendered.replace(ANSWER_MARK, "a disc") == codec.prompts.render(said)


def test_words_of_the_user_that_are_control_tokens_are_marked_as_text(tiny_bundle: Path) -> None:
    codec = TextCodec.from_bundle(Bundle.open(tiny_bundle))
    rendered = render_turns(codec, TURNS)[1].rendered
    assert rendered is not None
    assert "and \U000f0000<image>\U000f0001 there?" in rendered
