"""A template is found where stock processors and tokenizers find it, in the same order."""

from __future__ import annotations

import json

import pytest

from pocketvlm.errors import CheckpointError
from pocketvlm.prompt.chat_template import find_chat_template

PLACES = [
    ("processor_config.json", lambda t: json.dumps({"chat_template": t})),
    ("chat_template.json", lambda t: json.dumps({"chat_template": t})),
    ("chat_template.jinja", lambda t: t),
    ("tokenizer_config.json", lambda t: json.dumps({"chat_template": t})),
]


def find(folder):
    return find_chat_template(folder, error=CheckpointError)


def test_the_first_place_of_stock_wins(tmp_path):
    for name, content in PLACES:
        (tmp_path / name).write_text(content(name))
    for name, _ in PLACES:
        found = find(tmp_path)
        assert (found.source, found.origin) == (name, tmp_path / name)
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r"no chat template; expected chat_template\.jinja"):
        find(tmp_path)


@pytest.mark.parametrize("name", [name for name, _ in PLACES if name.endswith(".json")])
@pytest.mark.parametrize(
    "value",
    [
        "the default",
        {"default": "the default", "tool_use": "other"},
        [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "the default"}],
    ],
)
def test_every_form_of_a_value(tmp_path, name, value):
    (tmp_path / name).write_text(json.dumps({"chat_template": value}))
    assert find(tmp_path).source == "the default"


def test_a_folder_of_named_templates(tmp_path):
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("other")
    with pytest.raises(CheckpointError, match="none of the chat templates is called default"):
        find(tmp_path)
    (folder / "default.jinja").write_text("named")
    assert find(tmp_path).source == "named"
    (tmp_path / "chat_template.jinja").write_text("main")
    assert find(tmp_path).source == "main"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    with pytest.raises(CheckpointError, match="both; transformers refuses that"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (7, "must be text, or templates by name"),
        ({"a": "b"}, "none of the chat templates is called default; there are: a"),
        ({}, "there are: none"),
        ({"default": 1}, "must be text"),
        ([1], "objects with name and template"),
        ([{"name": [], "template": "x"}], "objects with name and template"),
        ([{"name": "default"}], "objects with name and template"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path, value, complaint):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match=complaint):
        find(tmp_path)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "blob").write_text("secret")
    model = tmp_path / "model"
    model.mkdir()
    (model / "chat_template.jinja").symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        find(model)


def test_text_that_is_none_is_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is not UTF-8 text: byte 0"):
        find(tmp_path)
