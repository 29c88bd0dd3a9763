"""Samples from folders, scenes and noise; and one clear line for whatever can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from pocketvlm.calibration import CalibrationSet
from pocketvlm.errors import CalibrationError
from pocketvlm.prompt.messages import PICTURE


def write_folder(path, records, images=("a.png",)):
    path.mkdir(exist_ok=True)
    for number, name in enumerate(images):
        Image.new("RGB", (20 + number, 10), (200, 10 * number, 0)).save(path / name)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (path / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = {"image": "a.png", "question": "What is it?", "answer": "Red.", "kind": "color"}


def test_reads_both_ways_of_writing_a_sample(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
    ]
    folder = write_folder(tmp_path, [GOOD, "", {"image": "a.png", "messages": messages}])
    first, second = CalibrationSet.from_folder(folder)
    assert (first.question, first.answer, first.kind) == ("What is it?", "Red.", "color")
    assert (second.question, second.answer) == ("What is it?", "Red.")
    assert [(turn.role, turn.parts) for turn in second.turns] == [
        ("system", ("Be brief.",)),
        ("user", (PICTURE, "Hello")),
        ("assistant", ("Hi.",)),
        ("user", ("What is it?",)),
    ]
    assert second.where.endswith("data.jsonl:3")
    assert first.open_image().size == (20, 10)
    assert first.open_image().mode == "RGB"


def test_the_digest_follows_words_pictures_and_order(tmp_path):
    two = [GOOD, {**GOOD, "image": "b.png"}]
    folder = write_folder(tmp_path, two, images=("a.png", "b.png"))
    digest = CalibrationSet.from_folder(folder).sha256
    assert CalibrationSet.from_folder(folder).sha256 == digest
    changed = [
        write_folder(tmp_path, two[::-1], images=("a.png", "b.png")),
        write_folder(tmp_path, [GOOD, {**two[1], "answer": "Blue."}], images=("a.png", "b.png")),
    ]
    for other in changed:
        assert CalibrationSet.from_folder(other).sha256 != digest
    write_folder(tmp_path, two, images=("b.png", "a.png"))
    assert CalibrationSet.from_folder(tmp_path).sha256 != digest


def test_describes_itself(tmp_path):
    folder = write_folder(tmp_path, [GOOD, {**GOOD, "image": "b.png"}], images=("a.png", "b.png"))
    described = CalibrationSet.from_folder(folder).describe()
    assert described["samples"] == described["images"] == described["image_sizes"] == 2
    assert described["smallest_image"] == [20, 10]
    assert described["largest_image"] == [21, 10]
    assert described["is_synthetic"] is False


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{nonsense", r"data.jsonl:2: cannot be read as JSON"),
        ("[1]", r"data.jsonl:2: is a list, not an object"),
        ({**GOOD, "image": "gone.png"}, r"data.jsonl:2: image .*gone.png: is missing"),
        ({**GOOD, "image": "bad.png"}, r"data.jsonl:2: .*bad.png: not a picture"),
        ({**GOOD, "image": "../a.png"}, r"data.jsonl:2: image .*not the name of a file inside"),
        ({**GOOD, "image": "/etc/hostname"}, r"data.jsonl:2: image .*not the name of a file"),
        ({**GOOD, "image": 3}, r"data.jsonl:2: a picture must be a file name, not 3"),
        ({"question": "?", "answer": "!"}, r"data.jsonl:2: a conversation without a picture"),
        ({"image": "a.png", "answer": "!"}, r'data.jsonl:2: has "answer"; a row is'),
        ({"image": "a.png", "messages": "?"}, r'data.jsonl:2: "messages" must be a list'),
        (
            {"image": "a.png", "messages": [{"role": "user", "content": "?"}]},
            r'data.jsonl:2: "messages" must end with',
        ),
        (
            {"image": "a.png", "messages": [{"role": "tool", "content": "?"}]},
            r"data.jsonl:2: role 'tool' is unknown; allowed: system, user, assistant, human, gpt",
        ),
        (
            {"image": "a.png", "messages": [{"role": "user", "content": 3}]},
            r'data.jsonl:2: "content" must be text, and is 3',
        ),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, record, message):
    folder = write_folder(tmp_path, [GOOD, record])
    (folder / "bad.png").write_bytes(b"no picture")
    with pytest.raises(CalibrationError, match=message) as caught:
        CalibrationSet.from_folder(folder)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(CalibrationError, match="is not a folder"):
        CalibrationSet.from_folder(tmp_path / "none")
    with pytest.raises(CalibrationError, match="data.jsonl is missing"):
        CalibrationSet.from_folder(tmp_path)
    write_folder(tmp_path, [""])
    with pytest.raises(CalibrationError, match="is empty"):
        CalibrationSet.from_folder(tmp_path)
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CalibrationError, match="is not UTF-16 text"):
        CalibrationSet.from_folder(tmp_path)
    with pytest.raises(CalibrationError, match="holds no samples"):
        CalibrationSet.synthetic(0)


def test_text_alone_is_allowed_where_it_is_asked_for(tmp_path):
    folder = write_folder(tmp_path, [{"question": "?", "answer": "!"}])
    (sample,) = CalibrationSet.from_folder(folder, require_images=False)
    assert sample.image is None
    with pytest.raises(CalibrationError, match="has no image"):
        sample.open_image()


def test_a_picture_cut_short_is_named_when_it_is_opened(tmp_path):
    folder = write_folder(tmp_path, [GOOD])
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "a.png")
    content = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(content[: len(content) // 2])
    (sample,) = CalibrationSet.from_folder(folder)
    with pytest.raises(CalibrationError, match="a.png: the picture is damaged or truncated"):
        sample.open_image()


def test_pictures_of_extreme_size(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, [GOOD])
    Image.new("L", (1, 1)).save(folder / "a.png")
    assert CalibrationSet.from_folder(folder).describe()["largest_image"] == [1, 1]
    # Writing 400 million pixels takes seconds; a lower limit takes the same path.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (20, 20)).save(folder / "a.png")
    with pytest.raises(CalibrationError, match=r"a\.png: the picture has more than 200 pixels"):
        CalibrationSet.from_folder(folder)


def test_generated_sets_are_reproducible_and_disjoint():
    scenes = CalibrationSet.from_reference(3, 8)
    assert scenes.sha256 == CalibrationSet.from_reference(3, 8).sha256
    assert scenes.sha256 != CalibrationSet.from_reference(4, 8).sha256
    assert scenes.sha256 != CalibrationSet.from_reference(3, 8, split="evaluation").sha256
    assert len({sample.kind for sample in scenes}) == 8
    assert CalibrationSet.from_reference(3, 20).take(8).sha256 == scenes.sha256


def test_the_synthetic_fallback_declares_itself():
    noise = CalibrationSet.synthetic(4, seed=1)
    assert noise.is_synthetic
    assert noise.describe()["is_synthetic"] is True
    assert noise.sha256 == CalibrationSet.synthetic(4, seed=1).sha256
    assert noise.sha256 != CalibrationSet.synthetic(4, seed=2).sha256
    low, high = noise.samples[0].open_image().convert("L").getextrema()
    assert high - low > 100


def test_reading_samples_needs_no_torch():
    script = "import sys, pocketvlm.calibration.source; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
