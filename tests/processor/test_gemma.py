"""Prompts and pixels of the Gemma kind are those of its stock processors, for every size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pocketvlm.checkpoint import read_model_folder
from pocketvlm.checkpoint.config import read_config, read_spec
from pocketvlm.errors import CheckpointError, InputError
from pocketvlm.pipeline.sources import inspect_model
from pocketvlm.pipeline.stock import _load_processor
from pocketvlm.processor import Processor
from pocketvlm.prompt.messages import Turn, user_turn
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.runtime.preprocess import ImagePreprocessor
from tests.conftest import notes_of_ours
from tests.processor.test_tiles import SIZES, picture

NAMES = ("paligemma", "gemma3")
ANSWER = Turn(role="assistant", parts=("a yellow thing",))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gemma")
    for name in NAMES:
        write_tiny_model(name, root / name)
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def processors(folders: dict[str, Path]) -> dict[str, tuple[Processor, Any]]:
    return {
        name: (
            Processor.load(path, read_spec(read_config(path))),
            _load_processor(read_model_folder(path))[0],
        )
        for name, path in folders.items()
    }


def stock_inputs(stock: Any, turns: list[Turn], images: list[Image.Image]) -> Any:
    shown = iter(images)
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image", "image": next(shown)}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]
    return stock.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_those_of_the_stock_processor(processors, name):
    processor, stock = processors[name]
    preprocessor = ImagePreprocessor.from_settings(processor.image_processor.settings)
    assert len(SIZES) >= 50
    for size in SIZES:
        image = picture(size)
        expected = stock_inputs(stock, [user_turn("what is it?", 1)], [image])
        ours = preprocessor.pixels(image)
        np.testing.assert_array_equal(ours, expected["pixel_values"])
        np.testing.assert_array_equal(processor.pixels([image]).numpy(), ours)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("turns", "pictures"),
    [
        ([user_turn("what is it?", 1)], 1),
        ([user_turn("", 1)], 1),
        ([user_turn("é🙂 \n x", 1)], 1),
        ([user_turn("which of them?", 3)], 3),
        ([user_turn("what is it?", 1), ANSWER, user_turn("and that?", 0)], 1),
        ([user_turn("what is it?", 1), ANSWER, user_turn("and this?", 2)], 3),
    ],
)
def test_prompts_are_those_of_the_stock_processor(processors, name, turns, pictures):
    processor, stock = processors[name]
    images = [picture((60, 40 + number)) for number in range(pictures)]
    expected = stock_inputs(stock, turns, images)["input_ids"][0].tolist()
    assert processor.encode([turn.to_message() for turn in turns]) == expected
    spec = processor.spec
    assert expected.count(spec.image_token_id) == pictures * spec.visual_tokens


def test_a_prefix_ends_with_a_line_break_and_its_answer_with_the_end_token(processors):
    processor, _ = processors["paligemma"]
    turns = [user_turn("what is it?", 1), ANSWER]
    asked = processor.encode([turns[0].to_message()])
    both = processor.encode([turn.to_message() for turn in turns], add_generation_prompt=False)
    assert both[: len(asked)] == asked
    said = processor.tokenizer.encode("a yellow thing", add_special_tokens=False)
    assert both[len(asked) :] == [*said, processor.tokenizer.eos_token_id]
    first = processor.tokenizer.bos_token_id
    pictures = processor.spec.visual_tokens
    assert asked[:pictures] == [processor.spec.image_token_id] * pictures
    assert asked[pictures] == first
    assert asked.count(first) == 1


def test_a_model_without_turns_takes_no_system_prompt(processors):
    processor, _ = processors["paligemma"]
    system = Turn(role="system", parts=("be brief",))
    with pytest.raises(InputError, match="takes no system prompt"):
        processor.encode([system.to_message(), user_turn("what?", 1).to_message()])


def test_words_that_the_processor_adds_are_tokens(processors):
    processor, _ = processors["paligemma"]
    with pytest.raises(InputError, match="'<loc0012>', token 332, .* ends at 319"):
        processor.encode([user_turn("detect <loc0012>", 1).to_message()])


@pytest.mark.parametrize("name", NAMES)
def test_what_a_user_types_is_no_picture(processors, name):
    processor, _ = processors[name]
    word = processor.spec.image_mark or processor.spec.image_token
    ids = processor.encode([user_turn(f"write {word} now", 1).to_message()])
    assert ids.count(processor.spec.image_token_id) == processor.spec.visual_tokens


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_noted_of_a_folder_that_is_followed(folders, name):
    assert notes_of_ours(inspect_model(folders[name])[1]) == ()


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("gemma3", "preprocessor", {"do_pan_and_scan": True}, "do_pan_and_scan must be false"),
        ("gemma3", "processor", {"image_seq_length": 256}, "image_seq_length 256 means 256"),
        ("paligemma", "preprocessor", {"image_seq_length": 4}, "image_seq_length 4 means 4"),
        ("paligemma", "processor", {"processor_class": "Gemma3Processor"}, "not supported for"),
        (
            "gemma3",
            "preprocessor",
            {"image_processor_type": "SiglipImageProcessor"},
            "'SiglipImageProcessor' is not supported for gemma3",
        ),
    ],
)
def test_a_processor_that_cannot_be_followed_is_one_line(
    folders, tmp_path, name, file, change, message
):
    path = shutil.copytree(folders[name], tmp_path / name)
    settings = path / f"{file}_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message) as caught:
        inspect_model(path)
    assert "\n" not in str(caught.value)


def test_a_count_that_stock_needs_and_no_file_states_is_a_note(folders, tmp_path):
    path = shutil.copytree(folders["paligemma"], tmp_path / "model")
    settings = path / "preprocessor_config.json"
    stated = json.loads(settings.read_text())
    del stated["image_seq_length"]
    settings.write_text(json.dumps(stated))
    _, notes = inspect_model(path)
    assert any("states no image_seq_length, for which stock processors fail" in n for n in notes)
