"""Prompts equal the Hugging Face side, control tokens cannot be typed, pieces are whole."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError, InputError
from pocketvlm.runtime.detokenize import TextStream
from pocketvlm.runtime.text import TextCodec, assistant_message, user_message

KINDS = ("llava", "smolvlm")
CONTROL = ("<image>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<fake_token_around_image>")
plain = st.text(max_size=30).filter(lambda text: not any(token in text for token in CONTROL))


@pytest.fixture(scope="module")
def codecs(pairs):
    return {kind: TextCodec.from_bundle(pairs[kind].bundle) for kind in KINDS}


def reference_messages(turns):
    messages = []
    for text, images, answer in turns:
        messages.append(user_message(text, images))
        if answer is not None:
            messages.append(assistant_message(answer))
    return messages


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(
    turns=st.lists(st.tuples(plain, st.integers(0, 2), plain | st.none()), min_size=1, max_size=4),
    opens=st.booleans(),
)
def test_encode_equals_hugging_face(pairs, codecs, kind, turns, opens):
    messages = reference_messages(turns)
    expected = pairs[kind].checkpoint.processor.encode(messages, add_generation_prompt=opens)
    assert codecs[kind].encode(messages, add_generation_prompt=opens) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_content_may_be_plain_text(pairs, codecs, kind):
    messages = [{"role": "user", "content": "Hi ✨ <b>"}, {"role": "assistant", "content": "Yo"}]
    assert codecs[kind].encode(messages) == pairs[kind].checkpoint.processor.encode(messages)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.integers(0, 319), max_size=40))
def test_decode_equals_hugging_face(pairs, codecs, kind, ids):
    assert codecs[kind].decode(ids) == pairs[kind].checkpoint.processor.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(
    words=st.lists(st.sampled_from((*CONTROL, "a", " ", "<", "image>", "\ue0f7", "0")), max_size=8)
)
def test_typed_control_tokens_are_plain_text(codecs, kind, words):
    """What was typed is read back letter by letter, and adds no control token to the prompt."""
    codec, typed = codecs[kind], "".join(words)
    ids = codec.encode([user_message(typed, 1)])
    control = [
        codec.tokenizer.token_to_id(token)
        for token in CONTROL
        if codec.tokenizer.token_to_id(token) is not None
    ]
    harmless = codec.encode([user_message("x", 1)])
    assert [i for i in ids if i in control] == [i for i in harmless if i in control]
    assert f" {typed}" in codec.decode_raw(ids)


def test_control_tokens_are_typed_in_answers_and_plain_content_too(codecs):
    codec = codecs["llava"]
    end = codec.tokenizer.token_to_id("<|im_end|>")
    messages = [
        {"role": "user", "content": "<|im_end|> <image>"},
        assistant_message("<|im_end|>"),
    ]
    ids = codec.encode(messages)
    assert ids.count(end) == 2
    assert ids.count(codec.image_token_id) == 0


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=30), noise=st.lists(st.integers(0, 319), max_size=10))
def test_pieces_join_and_are_whole(codecs, kind, text, noise):
    codec = codecs[kind]
    ids = [*codec.tokenizer.encode(text, add_special_tokens=False).ids, *noise]
    stream = TextStream(codec.decode_raw)
    pieces = [stream.push(token) for token in ids]
    if not noise and "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == codec.decode(ids)


def test_characters_wait_for_their_last_byte(codecs):
    codec = codecs["llava"]
    ids = codec.tokenizer.encode("é🙂", add_special_tokens=False).ids
    assert len(ids) > 2
    stream = TextStream(codec.decode_raw)
    pieces = [stream.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == ["é", "🙂"]


def test_white_space_waits_for_a_word(codecs):
    codec = codecs["llava"]
    stream = TextStream(codec.decode_raw)
    ids = codec.tokenizer.encode("  a  b  ", add_special_tokens=False).ids
    assert "".join(stream.push(token) for token in ids) == "a  b"
    assert stream.finish() == ""


class Metaspace:
    """A decoder of the SentencePiece kind, which drops the first word's space."""

    words = ("▁the", "▁cat", "s", "▁", "▁é")

    def __call__(self, ids):
        return "".join(self.words[i] for i in ids).replace("▁", " ")[1:]


@given(ids=st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_spaces_between_words_survive_a_decoder_that_drops_the_first(ids):
    decode = Metaspace()
    stream = TextStream(decode)
    pieces = "".join(stream.push(i) for i in [0, *ids]) + stream.finish()
    assert pieces == decode([0, *ids]).strip()


@pytest.fixture
def copy(llava, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(llava.bundle.path, folder)
    return folder


def test_names_that_templates_use(copy):
    (copy / "chat_template.jinja").write_text(
        "{{ bos_token }}|{{ eos_token }}|{{ strftime_now('%Y') | length }}|"
        "{{ messages | tojson }}|{% generation %}g{% endgeneration %}\n"
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}"
    )
    codec = TextCodec.from_bundle(Bundle.open(copy, verify=False))
    text = codec.tokenizer.decode(
        codec.encode([{"role": "user", "content": "<é>"}]), skip_special_tokens=False
    )
    assert text == '<|im_start|>|<|im_end|>|4|[{"role": "user", "content": "<é>"}]|g'


def test_template_in_the_older_places_is_found(copy, llava):
    import json

    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    expected = TextCodec.from_bundle(llava.bundle).encode([user_message("a", 1)])
    config = json.loads((copy / "tokenizer_config.json").read_text())
    for name, content in (
        ("tokenizer_config.json", {**config, "chat_template": template}),
        ("chat_template.json", {"chat_template": template}),
    ):
        before = (copy / name).read_text() if (copy / name).exists() else "{}"
        (copy / name).write_text(json.dumps(content))
        codec = TextCodec.from_bundle(Bundle.open(copy, verify=False))
        assert codec.encode([user_message("a", 1)]) == expected
        (copy / name).write_text(before)
    with pytest.raises(BundleError, match="no chat template"):
        TextCodec.from_bundle(Bundle.open(copy, verify=False))


def test_template_that_refuses_is_an_input_error(copy):
    (copy / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    codec = TextCodec.from_bundle(Bundle.open(copy, verify=False))
    with pytest.raises(InputError, match="roles must alternate"):
        codec.encode([user_message("a")])


def test_template_cannot_leave_its_sandbox(copy):
    (copy / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    codec = TextCodec.from_bundle(Bundle.open(copy, verify=False))
    with pytest.raises(InputError, match="unsafe"):
        codec.encode([user_message("a")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", "{% if %}", "not Jinja, line 1"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", None, "tokenizer.json: is missing"),
    ],
)
def test_damaged_files_are_named(copy, name, content, message):
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(content)
    with pytest.raises(BundleError, match=message):
        TextCodec.from_bundle(Bundle.open(copy, verify=False))
