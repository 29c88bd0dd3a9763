"""Whole answers: equal to the torch definition, turn by turn, and cheap in what they reuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pocketvlm.calibration.source import Sample
from pocketvlm.context import RunContext
from pocketvlm.errors import BundleError, InputError
from pocketvlm.evaluation.bundle_answers import answer_with_bundle
from pocketvlm.prompt.generation_settings import GenerationSettings
from pocketvlm.prompt.messages import PICTURE, Turn
from pocketvlm.reference_graph import forward
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.runtime.sampling import Sampling
from pocketvlm.runtime.text import assistant_message, user_message

from .conftest import noise


def torch_answer(checkpoint, messages, pictures, count):
    """What `forward.greedy_generate` answers to a whole conversation."""
    ids = torch.tensor([checkpoint.processor.encode(messages)])
    with torch.inference_mode():
        visual = None
        if pictures:
            pixels = checkpoint.processor.pixels(pictures)
            visual = forward.encode_images(checkpoint, pixels)
        inputs = forward.embed_prompts(checkpoint, ids, visual)
    (answer,) = forward.greedy_generate(
        checkpoint,
        inputs,
        max_new_tokens=count,
        eos_token_ids=checkpoint.processor.eos_token_ids,
    )
    return answer


@pytest.mark.parametrize("seed", [0, 1])
def test_answer_equals_torch(pair, seed):
    picture = noise(seed)
    answer = Conversation(pair.bundle).ask(f"What is it? {seed}", picture, max_new_tokens=12)
    expected = torch_answer(
        pair.checkpoint, [user_message(f"What is it? {seed}", 1)], [picture], 12
    )
    assert list(answer.token_ids) == expected
    assert answer.text == pair.checkpoint.processor.decode(expected)
    manifest = pair.bundle.manifest
    assert answer.timings.visual_tokens == manifest.visual_tokens


def test_text_only_prompt_equals_torch(pair):
    answer = Conversation(pair.bundle).ask("Hello", max_new_tokens=8)
    expected = torch_answer(pair.checkpoint, [user_message("Hello")], [], 8)
    assert list(answer.token_ids) == expected
    assert answer.timings.visual_tokens == 0
    assert answer.timings.vision_ms == 0


def test_turns_equal_fresh_runs_in_torch(pair):
    """A picture, a question about it, and a second picture, each held to a run from nothing."""
    talk = Conversation(pair.bundle)
    pictures, messages = [], []
    for prompt, picture in (("One", noise(1)), ("Two, näher", None), ("Three", noise(2))):
        pictures += [] if picture is None else [picture]
        messages.append(user_message(prompt, 0 if picture is None else 1))
        answer = talk.ask(prompt, picture, max_new_tokens=6)
        assert list(answer.token_ids) == torch_answer(pair.checkpoint, messages, pictures, 6)
        messages.append(assistant_message(answer.text))
    assert talk.messages == messages


def test_several_pictures_in_one_turn_equal_torch(pair):
    """Two before the first question, two among the words of the second."""
    talk = Conversation(pair.bundle)
    pictures = [noise(seed) for seed in (1, 2, 3, 1)]
    first = talk.ask("One", pictures[:2], max_new_tokens=6)
    messages = [user_message("One", 2)]
    assert list(first.token_ids) == torch_answer(pair.checkpoint, messages, pictures[:2], 6)
    between = Turn(role="user", parts=("this ", PICTURE, " or ", PICTURE, "?"))
    second = talk.ask(between, pictures[2:], max_new_tokens=6)
    messages += [assistant_message(first.text), between.to_message()]
    assert list(second.token_ids) == torch_answer(pair.checkpoint, messages, pictures, 6)
    assert second.timings.visual_tokens == 2 * pair.bundle.manifest.visual_tokens
    with pytest.raises(InputError, match="places for 2 pictures where 1 are given"):
        talk.ask(between, [noise(1)])
    with pytest.raises(InputError, match="nothing to answer"):
        talk.ask("", [])
    assert talk.messages[:-1] == messages


def test_a_placeholder_that_a_user_types_is_text(llava):
    """The runtime reads no `<image>` out of a prompt: only data sets write places so."""
    talk = Conversation(llava.bundle)
    asked = talk.ask("<image>\nWhat?", noise(1), max_new_tokens=2)
    assert asked.timings.visual_tokens == llava.bundle.manifest.visual_tokens
    assert talk.messages[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "<image>\nWhat?"},
    ]


def test_second_turn_runs_only_what_is_new(pair):
    talk = Conversation(pair.bundle)
    first = talk.ask("One", noise(1), max_new_tokens=6)
    second = talk.ask("Two", max_new_tokens=6)
    assert second.timings.visual_tokens == 0
    # The tiny template writes a space before an answer, so the answer's own rows may be run again.
    assert second.timings.reused_tokens >= first.timings.prompt_tokens
    assert second.rewound_rows <= len(first.token_ids)
    cached = first.timings.prompt_tokens + len(first.token_ids) - 1
    assert second.timings.reused_tokens + second.rewound_rows == cached


def test_template_that_rewrites_history_is_answered_right_and_told(llava, tmp_path):
    import shutil

    from pocketvlm.bundle import Bundle
    from pocketvlm.runtime.text import TextCodec

    folder = tmp_path / "bundle"
    shutil.copytree(llava.bundle.path, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}{% for i in m['content'] %}"
        "{% if i['type'] == 'image' %}<image>{% else %}{{ i['text'] }}{% endif %}{% endfor %}"
        "{% endfor %}"
    )
    bundle = Bundle.open(folder, verify=False)
    talk = Conversation(bundle)
    first = talk.ask("One", noise(1), max_new_tokens=4)
    assert first.rewound_rows == 0
    second = talk.ask("Two", max_new_tokens=4)
    assert second.timings.reused_tokens == 0
    assert second.rewound_rows == first.timings.prompt_tokens + 3
    assert second.timings.visual_tokens == bundle.manifest.visual_tokens
    # The same conversation, had it begun with these messages.
    fresh = Conversation(bundle)
    fresh.messages = talk.messages[:2]
    fresh._pictures = [*talk._pictures]
    assert fresh.ask("Two", max_new_tokens=4).token_ids == second.token_ids
    assert TextCodec.from_bundle(bundle).encode(talk.messages)


def test_pieces_join_to_the_text(pair):
    pieces: list[str] = []
    answer = Conversation(pair.bundle).ask(
        "Tell", noise(3), max_new_tokens=40, on_token=pieces.append
    )
    assert "".join(pieces) == answer.text
    assert answer.text == pair.checkpoint.processor.decode(answer.token_ids)
    assert len(pieces) > 1


def test_picture_matters(pair):
    logits = []
    for seed in (4, 5):
        runner = OnnxRunner(pair.bundle)
        Conversation(pair.bundle, runner=runner).ask("What?", noise(seed), max_new_tokens=1)
        logits.append(runner._logits.copy())
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_end_token_ends_the_answer_and_is_left_out(llava):
    first = Conversation(llava.bundle).ask("Hm", max_new_tokens=8)
    end = first.token_ids[4]
    generation = replace(llava.bundle.manifest.generation, eos_token_ids=(end,))
    bundle = replace(llava.bundle, manifest=replace(llava.bundle.manifest, generation=generation))
    answer = Conversation(bundle).ask("Hm", max_new_tokens=8)
    assert answer.stop_reason == "end"
    assert answer.token_ids == first.token_ids[: first.token_ids.index(end)]
    assert first.stop_reason == "max_new_tokens"


def test_settings_steer_every_turn_as_they_steer_torch(llava):
    """The bundle is told by its manifest alone; torch by the checkpoint's processor."""
    plain = Conversation(llava.bundle).ask("What?", noise(1), max_new_tokens=8)
    settings = {
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
        "begin_suppress_tokens": [plain.token_ids[0]],
        "suppress_tokens": [plain.token_ids[1]],
    }
    processor = llava.checkpoint.processor
    generation = GenerationSettings.from_stock(
        {**settings, "eos_token_id": list(processor.eos_token_ids)}, "here", error=BundleError
    )
    steered = replace(llava.checkpoint, processor=replace(processor, generation=generation))
    said = replace(llava.bundle.manifest.generation, settings=generation.to_json())
    bundle = replace(llava.bundle, manifest=replace(llava.bundle.manifest, generation=said))
    talk = Conversation(bundle)
    answer = talk.ask("What?", noise(1), max_new_tokens=8)
    asked = [user_message("What?", 1)]
    assert list(answer.token_ids) == torch_answer(steered, asked, [noise(1)], 8)
    assert answer.token_ids != plain.token_ids
    second = talk.ask("And now?", max_new_tokens=8)
    asked += [assistant_message(answer.text), user_message("And now?")]
    assert list(second.token_ids) == torch_answer(steered, asked, [noise(1)], 8)
    sample = Sample(image=noise(1), question="What?", answer=answer.text)
    (text,) = answer_with_bundle(
        bundle, [sample], max_new_tokens=8, ctx=RunContext(threads=1), task="t"
    )
    assert text == answer.text


def test_abandoned_stream_takes_the_question_back(pair):
    talk = Conversation(pair.bundle)
    talk.ask("One", noise(1), max_new_tokens=4)
    before = list(talk.messages)
    stream = talk.stream("Lost", noise(2), max_new_tokens=20)
    next(stream)
    assert talk.messages == before
    # The other turn's picture takes the abandoned one's place in the prompt, not its cache rows.
    answer = talk.ask("Three", noise(3), max_new_tokens=4)
    messages = [*before, user_message("Three", 1)]
    expected = torch_answer(pair.checkpoint, messages, [noise(1), noise(3)], 4)
    assert list(answer.token_ids) == expected
    with pytest.raises(RuntimeError, match="another turn"):
        list(stream)


def test_capacity_bounds_prompt_and_answer(llava):
    runner = OnnxRunner(llava.bundle, capacity=40)
    talk = Conversation(llava.bundle, runner=runner)
    answer = talk.ask("Go", noise(1), max_new_tokens=60)
    assert answer.stop_reason == "capacity"
    assert runner.length == 40
    assert answer.timings.prompt_tokens + len(answer.token_ids) - 1 == 40
    before = list(talk.messages)
    with pytest.raises(InputError, match="allowed are 40"):
        talk.ask("More", noise(2))
    assert talk.messages == before
    talk.reset()
    again = talk.ask("Go", noise(1), max_new_tokens=60)
    assert again.token_ids == answer.token_ids


def test_positions_bound_the_conversation(pairs):
    """Original positions run ahead of the rows: 16 places for 5 tokens."""
    pair = pairs["llava-original"]
    generation = replace(pair.bundle.manifest.generation, max_positions=60)
    bundle = replace(pair.bundle, manifest=replace(pair.bundle.manifest, generation=generation))
    answer = Conversation(bundle).ask("Go", noise(1), max_new_tokens=60)
    assert answer.stop_reason == "capacity"
    rows = answer.timings.prompt_tokens + len(answer.token_ids) - 1
    assert rows == 60 - (16 - 5)
    with pytest.raises(InputError, match="the model has 60"):
        Conversation(bundle, runner=OnnxRunner(bundle, capacity=512)).ask("long " * 30)


@pytest.mark.parametrize(("prompt", "count"), [("", 4), (" \n", 4), ("What?", 0)])
def test_nothing_to_do_is_an_error(llava, prompt, count):
    with pytest.raises(InputError, match=r"prompt is empty|max_new_tokens is 0"):
        Conversation(llava.bundle).ask(prompt, max_new_tokens=count)


def test_empty_prompt_beside_a_picture_is_answered(pair, picture):
    answer = Conversation(pair.bundle).ask("", picture, max_new_tokens=3)
    expected = torch_answer(pair.checkpoint, [user_message("", 1)], [picture], 3)
    assert list(answer.token_ids) == expected


def test_picture_may_be_a_path(llava, picture, tmp_path):
    file = tmp_path / "p.png"
    picture.save(file)
    by_path = Conversation(llava.bundle).ask("?", file, max_new_tokens=3)
    by_name = Conversation(llava.bundle).ask("?", str(file), max_new_tokens=3)
    direct = Conversation(llava.bundle).ask("?", picture, max_new_tokens=3)
    assert by_path.token_ids == by_name.token_ids == direct.token_ids


def test_sampling_is_seeded(llava, picture):
    def ask(seed):
        sampling = Sampling(temperature=1.5, top_p=0.9, seed=seed)
        talk = Conversation(llava.bundle)
        return talk.ask("?", picture, max_new_tokens=12, sampling=sampling).token_ids

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def test_unknown_position_policy_is_an_error(llava):
    bundle = replace(llava.bundle, manifest=replace(llava.bundle.manifest, positions="shuffled"))
    with pytest.raises(BundleError, match="known are original, consecutive"):
        Conversation(bundle)


def test_timings_cover_the_turn(llava, picture):
    from time import perf_counter

    talk = Conversation(llava.bundle)
    covered = []
    for _ in range(5):
        talk.reset()
        start = perf_counter()
        answer = talk.ask("?", picture, max_new_tokens=10)
        wall_ms = (perf_counter() - start) * 1000
        t = answer.timings
        assert len(t.decode_ms) == len(answer.token_ids) - 1
        parts = (t.preprocess_ms, t.vision_ms, t.tokenize_ms, t.prefill_ms, t.sample_ms)
        assert min(*parts, *t.decode_ms, t.detokenize_ms) > 0
        covered.append((sum(parts) + sum(t.decode_ms) + t.detokenize_ms) / wall_ms)
    assert max(covered) <= 1
    # A busy machine may take the processor away between two laps, but not in every turn.
    assert max(covered) > 0.9
