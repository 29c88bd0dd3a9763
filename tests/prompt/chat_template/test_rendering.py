"""Rendering equals that of transformers, on templates that use what published ones use."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from pocketvlm.errors import CheckpointError, InputError
from pocketvlm.prompt.chat_template import ChatTemplate

TEMPLATES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}


def user(*items):
    return {"role": "user", "content": list(items)}


def text(words):
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}
CONVERSATIONS = {
    "one": [user(IMAGE, text("what's this? é <b>"))],
    "turns": [
        user(IMAGE, text(" a ")),
        {"role": "assistant", "content": [text("<think>hm</think>\nb")]},
        user(text("c"), {"type": "image", "image": "a.png"}),
    ],
    "system": [{"role": "system", "content": "be brief"}, user(text("q"))],
    "system list": [{"role": "system", "content": [text("be brief")]}, user(text("q"), IMAGE)],
    "string": [{"role": "user", "content": "just text"}],
    "tool": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": [{"a": "b"}]},
    ],
    "thought": [{"role": "assistant", "content": "x", "thinking": "t"}],
    "empty": [],
}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_rendering_is_that_of_transformers(path):
    source = path.read_text(encoding="utf-8")
    template = ChatTemplate(source, path)
    template.check(error=CheckpointError)
    rendered = 0
    for messages in CONVERSATIONS.values():
        for opened in (True, False):
            try:
                ((expected,), _) = render_jinja_template(
                    [messages],
                    chat_template=source,
                    add_generation_prompt=opened,
                    **VARIABLES,
                )
            except Exception:  # noqa: BLE001  (templates raise what they like)
                with pytest.raises(InputError, match="the chat template refuses"):
                    template.render(messages, VARIABLES, add_generation_prompt=opened)
                continue
            found = template.render(messages, VARIABLES, add_generation_prompt=opened)
            assert found == expected
            rendered += 1
    assert rendered >= 4, "a template that renders nothing shows nothing"


def test_empty_keys_are_left_out_and_links_are_pictures():
    template = ChatTemplate("{{ messages | tojson }}", Path("t"))
    messages = [
        {**user({"type": "image_url", "image_url": {"url": "u"}}), "name": None},
    ]
    assert template.render(messages, {}) == (
        '[{"role": "user", "content": [{"type": "image", "url": "u"}]}]'
    )


def test_a_template_knows_the_time_and_may_refuse():
    now = ChatTemplate("{{ strftime_now('%Y') }}", Path("t")).render([], {})
    assert now == datetime.now().strftime("%Y")  # noqa: DTZ005  (local time is intended)
    refusing = ChatTemplate("{{ raise_exception('no\nsystem \x1b[31m role') }}", Path("t"))
    with pytest.raises(InputError, match=r"refuses this conversation: no system .\[31m role$"):
        refusing.render([], {})


def test_what_is_set_inside_a_generation_block_stays_inside():
    source = "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}"
    assert ChatTemplate(source, Path("t")).render([], {}) == "21"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{% if %}", "not Jinja, line 1"),
        ("{{ 'a' | wordwrap }}", "No filter named 'wordwrap'"),
        ("{% include 'x' %}", "line 1: Include is not available"),
        ("{% import 'x' as y %}", "line 1: Import is not available"),
        ("{% from 'x' import y %}", "line 1: FromImport is not available"),
        ("{% extends 'x' %}", "line 1: Extends is not available"),
        ("x" * 70_000, "has 70,000 bytes; at most 65,536"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_by_name(source, complaint):
    with pytest.raises(CheckpointError, match=complaint) as caught:
        ChatTemplate(source, Path("model/chat_template.jinja")).check(error=CheckpointError)
    assert str(caught.value).startswith("model/chat_template.jinja: ")
    assert "\n" not in str(caught.value)
