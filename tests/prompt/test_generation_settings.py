"""Settings that change greedy answers are those of stock `generate`, token by token."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CheckpointError
from pocketvlm.processor import user_message
from pocketvlm.prompt.generation_settings import GenerationSettings, read_generation_settings
from pocketvlm.reference import reference_model_path
from pocketvlm.reference_graph.forward import embed_prompts, encode_images, greedy_generate
from tests.processor.stock_rig import copy_model, edit_json, picture

TOKENS = 16


@pytest.fixture(scope="module")
def stock():
    path = reference_model_path("pocket-llava")
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.load(reference_model_path("pocket-llava"))


@pytest.fixture(scope="module")
def asked(checkpoint):
    ids = checkpoint.processor.encode([user_message("what colour is the shape?")])
    pixels = checkpoint.processor.pixels([picture()])
    with torch.inference_mode():
        visual = encode_images(checkpoint, pixels)
    return ids, pixels, embed_prompts(checkpoint, torch.tensor([ids]), visual)


def stock_answer(stock, asked, **settings):
    ids, pixels, _ = asked
    with torch.inference_mode():
        whole = stock.generate(
            input_ids=torch.tensor([ids]),
            pixel_values=pixels,
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            **settings,
        )
    answer = whole[0, len(ids) :].tolist()
    return answer[:-1] if answer[-1] == 2 else answer


def own_answer(checkpoint, asked, document):
    _, _, inputs = asked
    settings = GenerationSettings.from_stock(
        {"eos_token_id": 2, **document}, "here", error=CheckpointError
    )
    (answer,) = greedy_generate(
        checkpoint,
        inputs,
        max_new_tokens=TOKENS,
        eos_token_ids=settings.eos_token_ids,
        settings=settings,
    )
    return answer


@pytest.fixture(scope="module")
def plain(stock, asked):
    return stock_answer(stock, asked)


@pytest.mark.parametrize(
    "make",
    [
        lambda first: {"suppress_tokens": [first]},
        lambda first: {"begin_suppress_tokens": [first]},
        lambda first: {"bad_words_ids": [[first], [2]]},
        lambda first: {"bad_words_ids": [[33, 3], [3, first], [first, 2]], "min_new_tokens": 3},
        lambda _: {"repetition_penalty": 1.8, "min_new_tokens": 12},
        lambda _: {"encoder_repetition_penalty": 0.5, "min_new_tokens": 12},
        lambda _: {"no_repeat_ngram_size": 1, "min_new_tokens": 6},
        lambda _: {"no_repeat_ngram_size": 2, "min_new_tokens": 12},
        lambda _: {"min_new_tokens": 9},
        lambda _: {"min_length": 95},
        lambda first: {"sequence_bias": [[[first], -30.0], [[3, 321], 5.0]]},
        lambda first: {
            "min_new_tokens": 2,
            "suppress_tokens": [first],
            "exponential_decay_length_penalty": [3, 1.5],
        },
    ],
)
def test_each_setting_is_that_of_stock(stock, checkpoint, asked, plain, make):
    document = make(plain[0])
    expected = stock_answer(stock, asked, **document)
    assert own_answer(checkpoint, asked, document) == expected
    assert expected != plain, "a setting that changes nothing shows nothing"


def test_settings_need_the_prompt_and_plain_ones_cost_nothing(checkpoint, asked, plain):
    settings = GenerationSettings(eos_token_ids=(2,), suppress_tokens=(plain[0],))
    ids, _, inputs = asked
    with pytest.raises(ValueError, match="need the tokens of the prompts"):
        greedy_generate(
            checkpoint, replace(inputs, token_ids=None), max_new_tokens=2, settings=settings
        )
    logits = np.zeros(8, np.float32)
    assert GenerationSettings(eos_token_ids=(2,)).adjust(logits, ids, []) is logits
    assert (logits == 0).all()


def test_the_models_own_settings_are_the_default(asked, plain, tmp_path):
    model = copy_model("pocket-llava", tmp_path / "model")
    edit_json(model / "generation_config.json", lambda c: c.update(suppress_tokens=[plain[0]]))
    steered = Checkpoint.load(model)
    (answer,) = greedy_generate(steered, asked[2], max_new_tokens=4, eos_token_ids=(2,))
    assert answer
    assert plain[0] not in answer


def test_end_tokens_come_from_where_stock_takes_them(tmp_path):
    model = copy_model("pocket-llava", tmp_path / "model")
    own = GenerationSettings(eos_token_ids=(2,))
    assert read_generation_settings(model, error=CheckpointError) == (own, ())
    (model / "generation_config.json").unlink()
    edit_json(model / "config.json", lambda c: c["text_config"].update(eos_token_id=[5, 2]))
    edit_json(model / "tokenizer_config.json", lambda c: c.update(eos_token="<reserved_5>"))  # noqa: S106  (a token)
    for expected, change in (
        ((5, 2), dict.copy),
        ((7,), lambda c: c.update(eos_token_id=7)),
    ):
        edit_json(model / "config.json", change)
        found, _ = read_generation_settings(model, error=CheckpointError)
        stock = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        ends = stock.generation_config.eos_token_id
        assert found.eos_token_ids == expected == tuple(ends if isinstance(ends, list) else [ends])
    (model / "generation_config.json").write_text("{}")
    found, notes = read_generation_settings(model, error=CheckpointError)
    assert (found.eos_token_ids, notes) == ((), ())


def test_what_other_loops_must_apply_is_named(tmp_path):
    document = {"eos_token_id": 2, "suppress_tokens": [3], "repetition_penalty": 1.0}
    (tmp_path / "generation_config.json").write_text(json.dumps(document))
    _, (note,) = read_generation_settings(tmp_path, error=CheckpointError)
    assert note.startswith("generation_config.json: suppress_tokens applied by")


def test_what_is_not_applied_is_named(tmp_path):
    document = {"eos_token_id": 2, "num_beams": 4, "do_sample": True, "guidance_scale": 1.0}
    (tmp_path / "generation_config.json").write_text(json.dumps(document))
    _, notes = read_generation_settings(tmp_path, error=CheckpointError)
    assert [note.partition(" is not")[0] for note in notes] == [
        "generation_config.json: do_sample=True",
        "generation_config.json: num_beams=4",
    ]


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ({"eos_token_id": "x"}, "eos_token_ids"),
        ({"eos_token_id": [-1]}, "token -1 is below 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"bad_words_ids": [[]]}, "must not hold empty sequences"),
        ({"suppress_tokens": 5}, "suppress_tokens: must be a list"),
        ({"no_repeat_ngram_size": [1]}, "no_repeat_ngram_size: must be a whole number"),
    ],
)
def test_a_value_that_does_not_fit_is_one_line(tmp_path, document, complaint):
    (tmp_path / "generation_config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=complaint):
        read_generation_settings(tmp_path, error=CheckpointError)
