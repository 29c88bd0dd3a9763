from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pocketvlm.device_bench.workload import (
    PRESETS,
    Workload,
    draw_picture,
    fit_text,
    load_workload,
)
from pocketvlm.errors import InputError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 4}, "repeats is 4; at least 5"),
        ({"warm_ups": 0}, "warm_ups is 0; at least 1"),
        ({"new_tokens": 1}, "new_tokens is 1; at least 2"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"cool_down_s": -1.0}, "cool_down_s"),
        ({"cool_down_s": float("nan")}, "cool_down_s"),
        ({"image_size": 4}, "8 to 8192"),
        ({"image_size": 64, "image_files": ("a.png",)}, "exclude each other"),
    ],
)
def test_a_workload_that_gives_no_honest_figure_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Workload(**{"name": "x", "prompt_tokens": 8, "new_tokens": 8, **change})


def test_presets_are_the_shapes_of_the_field():
    shapes = {
        name: (workload.image_size, workload.prompt_tokens, workload.new_tokens)
        for name, workload in PRESETS.items()
    }
    assert shapes == {
        "vlm": (512, 32, 128),
        "short": (None, 96, 64),
        "llama-bench": (None, 512, 128),
        "litert-lm": (None, 256, 256),
        "core-ai": (None, 512, 1024),
    }
    assert load_workload("vlm") is PRESETS["vlm"]
    with pytest.raises(InputError, match="'huge' is not known; there are vlm, short, llama-bench"):
        load_workload("huge")


def test_the_picture_is_always_the_same_and_has_content():
    content = draw_picture(64)
    assert content == draw_picture(64)
    pictures = Workload(name="x", prompt_tokens=8, new_tokens=2, image_size=64, pictures=3)
    assert len({content, *pictures.encoded_pictures()}) == 3
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")
        assert len(image.getcolors(64 * 64)) > 500


def test_an_image_file_is_taken_as_it_is_and_a_broken_one_refused(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (5, 3), "red").save(good)
    bad.write_bytes(b"no picture")
    take = {"name": "x", "prompt_tokens": 8, "new_tokens": 2}
    assert Workload(**take, image_files=(good, good)).encoded_pictures() == (good.read_bytes(),) * 2
    assert Workload(**take).encoded_pictures() == ()
    for file in (bad, tmp_path / "missing.png"):
        with pytest.raises(InputError, match=file.name):
            Workload(**take, image_files=(file,)).encoded_pictures()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(min_value=12, max_value=300),
    overhead=st.integers(min_value=0, max_value=10),
    width=st.integers(min_value=1, max_value=7),
)
def test_a_prompt_has_exactly_the_tokens_asked_for(tokens, overhead, width):
    """For any length of the template and of the tokenizer's tokens."""

    def count_tokens(text: str) -> int:
        words = text.split()
        return overhead + sum(-(-len(word) // width) for word in words)

    assert count_tokens(fit_text(count_tokens, tokens)) == tokens


def test_a_template_that_is_longer_than_the_prompt_is_named():
    with pytest.raises(InputError, match="takes 41 tokens .* 40 prompt tokens does not fit"):
        fit_text(lambda text: 40 + len(text), 40)


def test_a_count_that_no_text_meets_ends():
    with pytest.raises(InputError, match="found no text of exactly 11"):
        fit_text(lambda text: 2 * len(text.split()), 11)
