"""Prompts and texts are those of stock processors, on altered copies of the reference models."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from pocketvlm.checkpoint import read_model_folder
from pocketvlm.errors import CheckpointError, InputError
from pocketvlm.processor import Processor
from pocketvlm.processor.tokenizer import bounded_templates
from tests.processor.stock_rig import copy_model, edit_json, picture

TEXTS = (
    "what is it?",
    "write an <image> tag </s> now",
    "<s>",
    " <image>",
    "a</s>b",
    "",
    "é🙂 \n x",
    "\U000f0000<image>\U000f0001",
    "</s></s>",
    "x <reserved_5>",
)


def user(text, *images):
    pictures = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def conversations(text):
    image = picture()
    answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    return [user(text, image)], [user(text)], [user("a", image), answer, user(text, image)]


def character_tokenizer(scheme="first", *, split=False, legacy=False):
    """One token per character, as SentencePiece would, with fallback to bytes."""
    special = ["<pad>", "<s>", "</s>", "<image>", *(f"<reserved_{n}>" for n in range(4, 8))]
    vocab = {token: number for number, token in enumerate(special)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for sign in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789?!.,:;<>/'\n":
        vocab.setdefault(sign, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def unigram_tokenizer():
    special = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]
    signs = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?!.,:;<>/'\n"
    words = [(word, -1.0) for word in ("▁.", "▁n't", "▁'", "▁,", "▁'re")]
    vocab = [*((t, 0.0) for t in special), *((s, -3.0) for s in signs), *words]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=4))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def without_bos(model):
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ bos_token }}", ""))


def with_post_processor(model, before, after):
    text = {"Sequence": {"id": "A", "type_id": 0}}
    ids = {"<s>": 1, "</s>": 2, "<|im_start|>": 1}
    tokens = [*before, *after]
    single = [
        *({"SpecialToken": {"id": t, "type_id": 0}} for t in before),
        text,
        *({"SpecialToken": {"id": t, "type_id": 0}} for t in after),
    ]
    processor = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in tokens},
    }
    edit_json(model / "tokenizer.json", lambda j: j.update(post_processor=processor))


def configure(model, **settings):
    edit_json(model / "tokenizer_config.json", lambda c: c.update(settings))


def rename_image(model):
    for file in model.glob("*.j*"):
        file.write_text(file.read_text().replace("<image>", "<|img|>"))


def image_by_variable(model):
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<image>", "{{ image_token }}"))


def bos(model):
    without_bos(model)
    with_post_processor(model, ["<s>"], [])


def bos_and_eos(model):
    without_bos(model)
    with_post_processor(model, ["<s>"], ["</s>"])


def bos_twice(model):
    with_post_processor(model, ["<s>"], [])


def bos_by_setting(model):
    without_bos(model)
    configure(model, add_bos_token=True)


def llama_class(model):
    without_bos(model)
    character_tokenizer().save(str(model / "tokenizer.json"))
    configure(model, tokenizer_class="LlamaTokenizerFast", add_bos_token=True, legacy=True)


def llama_class_without_prefix(model):
    character_tokenizer(legacy=True).save(str(model / "tokenizer.json"))
    configure(model, tokenizer_class="LlamaTokenizer", legacy=False, add_prefix_space=False)


def named_in_dict(model):
    image_by_variable(model)
    edit_json(model / "tokenizer_config.json", lambda c: c.pop("image_token"))
    configure(model, extra_special_tokens={"image_token": "<image>"})


def named_in_older_file(model):
    edit_json(model / "tokenizer_config.json", lambda c: (c.pop("bos_token"), c.pop("eos_token")))
    (model / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}})
    )


def added_in_older_file(model):
    (model / "added_tokens.json").write_text(json.dumps({"<new>": 512, "now": 513}))


def truncated(model):
    truncation = {"direction": "Right", "max_length": 700, "strategy": "LongestFirst", "stride": 0}
    edit_json(model / "tokenizer.json", lambda j: j.update(truncation=truncation))


def listed_control(model):
    configure(model, chat_control_tokens=["now"])


def cleaned_up(model):
    unigram_tokenizer().save(str(model / "tokenizer.json"))
    configure(model, clean_up_tokenization_spaces=True)


def metaspace(scheme, **options):
    def change(model):
        character_tokenizer(scheme, **options).save(str(model / "tokenizer.json"))

    change.__name__ = f"metaspace_{scheme}_{'_'.join(options)}"
    return change


CHANGES = [
    rename_image,
    image_by_variable,
    bos,
    bos_and_eos,
    bos_twice,
    bos_by_setting,
    llama_class,
    llama_class_without_prefix,
    named_in_dict,
    named_in_older_file,
    added_in_older_file,
    truncated,
    listed_control,
    cleaned_up,
    metaspace("first"),
    metaspace("always", split=True),
    metaspace("never"),
    metaspace("first", legacy=True),
]


def load(model):
    return Processor.load(model, read_model_folder(model).spec)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_prompts_and_texts_are_those_of_stock(change, tmp_path):
    model = copy_model("pocket-llava", tmp_path / "model")
    change(model)
    own, stock = load(model), AutoProcessor.from_pretrained(model)
    compared = 0
    for text in TEXTS:
        typed = "<" in text or "\U000f0000" in text
        for messages in conversations(text):
            # The default equals the sanitized prompt where there is nothing to sanitize; the
            # latter is not implemented for tokens that the tokenizer adds.
            for options in [{"sanitize_control_tokens": True}] + [{}] * (not typed):
                try:
                    expected = stock.apply_chat_template(
                        messages,
                        add_generation_prompt=True,
                        tokenize=True,
                        return_dict=True,
                        **options,
                    )["input_ids"][0]
                except (NotImplementedError, ValueError):
                    continue
                assert own.encode(messages) == expected
                compared += 1
    assert compared >= 9
    draws = random.Random(0)
    for _ in range(100):
        ids = [draws.randrange(len(stock.tokenizer)) for _ in range(12)]
        assert own.decode(ids) == stock.tokenizer.decode(ids, skip_special_tokens=True).strip()
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    own.save_for_runtime(bundle)
    again = PreTrainedTokenizerFast.from_pretrained(bundle)
    for text in TEXTS:
        assert again(text)["input_ids"] == stock.tokenizer(text)["input_ids"]


def test_stock_takes_a_template_from_the_place_that_is_found_here(tmp_path):
    model = copy_model("pocket-llava", tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "B" + template}))
    assert load(model).chat_template == AutoProcessor.from_pretrained(model).chat_template
    assert load(model).chat_template.startswith("B")
    edit_json(model / "processor_config.json", lambda c: c.update(chat_template="A" + template))
    own = load(model)
    assert own.chat_template == AutoProcessor.from_pretrained(model).chat_template
    assert own.chat_template.startswith("A")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    own.save_for_runtime(bundle)
    assert (bundle / "chat_template.jinja").read_text() == own.chat_template
    assert "chat_template" not in json.loads((bundle / "processor_config.json").read_text())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: configure(m, image_token="</s>"), "image_token is '</s>', and token 3"),  # noqa: S106
        (lambda m: configure(m, split_special_tokens=True), "sets split_special_tokens"),
        (
            lambda m: edit_json(m / "config.json", lambda c: c.update(image_token_index=9999)),
            "token 9999 is the picture's, and the tokenizer has no such token",
        ),
        (
            lambda m: (m / "chat_template.jinja").write_text(
                "{% for m in messages %}{{ '[INST] ' + m['content'] }}{% endfor %}"
            ),
            "made for text alone.*can only concatenate str",
        ),
        (
            lambda m: (m / "chat_template.jinja").write_text(
                "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
            ),
            "made for text alone.*'<image>' 0 times for 1 picture",
        ),
        (
            lambda m: (m / "chat_template.jinja").write_text(
                "<image>{% for m in messages %}{{ m['content'] }}{% endfor %}"
            ),
            "made for text alone.*prints what a message holds",
        ),
        (lambda m: (m / "tokenizer.json").write_text('{"version": "1.0"}'), "tokenizer cannot be"),
        (lambda m: (m / "tokenizer.json").write_text("[" * 5000), "tokenizer cannot be read"),
        (
            lambda m: edit_json(m / "tokenizer.json", lambda j: j["model"].update(merges=[["a"]])),
            "tokenizer cannot be read",
        ),
        (
            lambda m: edit_json(m / "tokenizer.json", lambda j: j.update(decoder=5)),
            "tokenizer cannot be read",
        ),
        (lambda m: configure(m, bos_token=[1]), "tokenizer cannot be read"),
    ],
)
def test_what_cannot_be_used_is_one_line_at_the_start(change, complaint, tmp_path):
    model = copy_model("pocket-llava", tmp_path / "model")
    change(model)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load(model)
    assert "\n" not in str(caught.value)


def test_tokens_without_a_row_are_refused(tmp_path):
    model = copy_model("pocket-llava", tmp_path / "model")
    stock = AutoProcessor.from_pretrained(model).tokenizer
    stock.add_tokens([f"<animal{number}>" for number in range(40)])
    stock.save_pretrained(model)
    own = load(model)
    assert own.encode([user("is the <animal0> yellow?", picture())])
    with pytest.raises(InputError, match="'<animal39>', token 515, .* ends at 511"):
        own.encode([user("is the <animal39> yellow?", picture())])


def test_a_template_that_knows_stock_by_its_names_is_bounded_there_too(tmp_path):
    model = copy_model("pocket-llava", tmp_path / "model")
    template = model / "chat_template.jinja"
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    original = template.read_text()
    template.write_text(f"{{% if lipsum is defined %}}{loops}{{% endif %}}{original}")
    load(model)
    stock = AutoProcessor.from_pretrained(model)
    messages = [user("what is it?", picture())]
    with bounded_templates():
        found = stock.apply_chat_template(messages)
        template.write_text(loops)
        with pytest.raises(InputError, match="computes too much"):
            AutoProcessor.from_pretrained(model).apply_chat_template(messages)
    template.write_text(original)
    assert found == AutoProcessor.from_pretrained(model).apply_chat_template(messages)


def test_a_panic_of_the_tokenizer_is_one_line(tmp_path):
    """The Rust side panics with its own BaseException."""

    class PanicException(BaseException):
        pass

    class Panicking:
        def __init__(self, tokenizer):
            self._tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self._tokenizer, name)

        def encode(self, *args, **kwargs):
            raise PanicException("index out of bounds\nmore")

        decode = encode

    own = load(copy_model("pocket-llava", tmp_path / "model"))
    codec = replace(own.codec, tokenizer=Panicking(own.codec.tokenizer))
    with pytest.raises(InputError, match="cannot be tokenized: index out of bounds$"):
        codec.encode([user("a")])
    with pytest.raises(InputError, match="cannot be turned into text: index out of bounds$"):
        codec.decode([1])
