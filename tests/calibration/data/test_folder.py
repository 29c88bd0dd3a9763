"""Rows as people and other tools write them: read as intended, or one line for the row."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from pocketvlm.calibration import CalibrationSet
from pocketvlm.errors import CalibrationError
from pocketvlm.prompt.messages import PICTURE

GOOD = {"image": "a.png", "question": "what?", "answer": "red"}
TEXT = {"type": "text", "text": "what?"}
PLACE = {"type": "image"}
ANSWER = {"role": "assistant", "content": "red"}


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (20 + number, 10), (200, 0, 0)).save(tmp_path / name)
    return tmp_path


def read(folder, *rows, encoding="utf-8", end="\n", name="data.jsonl", **options):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_bytes((end.join(lines) + end).encode(encoding))
    return CalibrationSet.from_folder(folder, **options)


def asked(*content, **row):
    return {"messages": [{"role": "user", "content": list(content)}, ANSWER], **row}


def names(sample):
    return [path.name for path in sample.images]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_lines_end_at_a_line_feed_alone(folder, mark):
    row = {**GOOD, "question": f"what{mark}color?"}
    text = json.dumps(row, ensure_ascii=False)
    text = text.replace(json.dumps(mark)[1:-1], mark) if mark > " " else text
    (sample, second) = read(folder, text, "", GOOD)
    assert sample.question == f"what{mark}color?"
    assert second.where.endswith("data.jsonl:3")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_and_line_ends_of_other_tools(folder, encoding, end):
    samples = read(folder, {**GOOD, "question": "größer?"}, GOOD, encoding=encoding, end=end)
    assert [sample.question for sample in samples] == ["größer?", "what?"]


def test_pictures_stand_where_messages_have_them(folder):
    hello = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    later = asked(PLACE, TEXT, image="a.png")
    rows = read(
        folder,
        {**later, "messages": [*hello, *later["messages"]]},
        asked({"type": "text", "text": "look: "}, PLACE, TEXT, image="a.png"),
        asked(PLACE, PLACE, TEXT, images=["b.png", "a.png"]),
        asked({**PLACE, "image": "b.png"}, TEXT),
        asked({**PLACE, "path": "b.png", "text": None}, PLACE, TEXT, image=["a.png"]),
        asked({**PLACE, "index": 1}, {**PLACE, "index": 0}, TEXT, images=["a.png", "b.png"]),
        asked({"type": "image_url", "image_url": {"url": "b.png"}}, TEXT),
        {**GOOD, "image": ["a.png", "b.png"]},
    )
    assert [sample.turns[-1].parts for sample in rows] == [
        (PICTURE, "what?"),
        ("look: ", PICTURE, "what?"),
        (PICTURE, PICTURE, "what?"),
        (PICTURE, "what?"),
        (PICTURE, PICTURE, "what?"),
        (PICTURE, PICTURE, "what?"),
        (PICTURE, "what?"),
        (PICTURE, PICTURE, "what?"),
    ]
    assert [names(sample) for sample in rows] == [
        ["a.png"],
        ["a.png"],
        ["b.png", "a.png"],
        ["b.png"],
        ["b.png", "a.png"],
        ["b.png", "a.png"],
        ["b.png"],
        ["a.png", "b.png"],
    ]
    assert [turn.parts for turn in rows.samples[0].turns[:-1]] == [("hello",), ("hi",)]


def test_llavas_own_format_in_a_list(folder):
    row = {
        "id": "000",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat?"},
            {"from": "gpt", "value": "a car"},
            {"from": "human", "value": "which color?"},
            {"from": "gpt", "value": "red"},
        ],
    }
    (folder / "data.json").write_text(json.dumps([row, {**GOOD, "id": "001"}], indent=2))
    samples = CalibrationSet.from_folder(folder)
    first = samples.samples[0]
    assert [turn.parts for turn in first.turns] == [
        (PICTURE, "what?"),
        ("a car",),
        ("which color?",),
    ]
    assert (first.answer, first.where) == ("red", f"{folder / 'data.json'}, row 1")
    assert samples.notes == (f"{folder.name}: keys that are not read: 'id' (2 rows)",)


def test_what_is_left_out_is_noted(folder):
    rows = [GOOD, {"question": "why?", "answer": "so"}, "{broken"]
    samples = read(folder, *rows, limit=2, require_images=False)
    assert len(samples) == 2
    assert samples.notes == (
        f"{folder.name}: the first 2 of 3 rows are used",
        f"{folder.name}: 1 of 2 rows have no picture",
    )
    assert samples.take(1).notes == samples.notes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (asked(PLACE, PLACE, TEXT, image="a.png"), "more places .* than the row has"),
        (asked(PLACE, TEXT, images=["a.png", "b.png"]), "without a place .* 'b.png'"),
        (asked(PLACE, TEXT), "more places .* which are 0"),
        (asked({**PLACE, "index": 2}, TEXT, image="a.png"), "more places"),
        (asked({"type": "video"}, TEXT, image="a.png"), "'video'; allowed are objects of type"),
        (asked("what?", image="a.png"), "a part of a message is 'what\\?'"),
        (
            {**GOOD, "question": "<image>\n<image>\nwhich?"},
            "places for 2 pictures where 1 are given",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>?"}, ANSWER]},
            "places for 1 pictures where 0 are given",
        ),
        ({**GOOD, "image": "https://example.org/a.png"}, "is an address"),
        ({**GOOD, "image": "data:image/png;base64,AAAA"}, "is an address"),
        ({**GOOD, "image": "file:///a.png"}, "is an address"),
        ({**GOOD, "image": "../a.png"}, "not the name of a file inside"),
        ({**GOOD, "image": "pipe"}, "not a regular file"),
        ({**GOOD, "image": "outside.png"}, "leads out of its folder"),
        ({**GOOD, "image": "x" * 5000}, "must be a file name, not 'xxx"),
        ({**GOOD, "image": "x" * 500}, "is missing"),
        ({**GOOD, "image": {"path": "a.png"}}, "must be a file name, not an object"),
        ({**GOOD, "images": ["a.png"]}, 'has both "image" and "images"'),
        ({**GOOD, "messages": []}, 'has "messages", "question", "answer"'),
        ({**GOOD, "answer": 3}, '"answer" must be text, and is 3'),
        ({**GOOD, "answer": None}, '"answer" must be text, and is null'),
        ({**GOOD, "answer": ["red"]}, '"answer" must be text, and is a list'),
        ({**GOOD, "kind": 3}, '"kind" must be text'),
        ({"question": "what?", "image": "a.png"}, '"answer" must be text, and is missing'),
        ({"image": "a.png", "messages": []}, "must end with"),
        ({"image": "a.png", "messages": {}}, "must be a list, not an object"),
        ({"image": "a.png", "messages": [[]]}, "a message must be an object, not a list"),
        (
            {
                "image": "a.png",
                "messages": [
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "content": [PLACE]},
                ],
            },
            "the answer has a picture",
        ),
        ({"question": " ", "answer": "red"}, "nothing is asked"),
        ('{"image": "a.png", "question": "\\ud800", "answer": "red"}', "half of a surrogate pair"),
        ('{"image": "a.png", "question": NaN, "answer": "red"}', "must be text, and is nan"),
        ('{"image": "a.png", "question": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("3", "is 3, not an object"),
        ("null", "is null, not an object"),
    ],
)
def test_whatever_else_stands_there_is_one_line(folder, row, message):
    os.mkfifo(folder / "pipe")
    (folder / "outside.png").symlink_to("/etc/hostname")
    with pytest.raises(CalibrationError, match=f"data.jsonl:2: .*{message}") as caught:
        read(folder, GOOD, row, require_images=False)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_folder_without_rows_says_what_rows_look_like(folder):
    with pytest.raises(CalibrationError, match=r'data.jsonl is missing; a row is \{"image"'):
        CalibrationSet.from_folder(folder)
    (folder / "data.json").write_text("{}")
    with pytest.raises(CalibrationError, match="must be a list of rows"):
        CalibrationSet.from_folder(folder)
    (folder / "data.jsonl").symlink_to("/etc/hostname")
    with pytest.raises(CalibrationError, match="leads out of its folder"):
        CalibrationSet.from_folder(folder)


def test_the_digest_follows_the_places_of_pictures(folder):
    front = read(folder, asked(PLACE, TEXT, image="a.png")).sha256
    behind = read(folder, asked(TEXT, PLACE, image="a.png")).sha256
    assert front != behind
    assert front == read(folder, GOOD).sha256
