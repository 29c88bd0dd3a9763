"""One small byte-level BPE vocabulary, dressed in the special tokens of each model family.

Both models share the vocabulary, ids included, because they start from one pretrained decoder.
Every word of the question grammar is a single token; any other text falls back to bytes, so nothing
is unknown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pocketvlm.reference.questions import FORMS, questions_about
from pocketvlm.reference.scenes import COLORS, SHAPES, SIZES, WORDS, sample_scene

__all__ = [
    "BOS_ID",
    "DIALECTS",
    "EOS_ID",
    "IMAGE_ID",
    "PAD_ID",
    "SCENE_DIALECTS",
    "VOCABULARY_SIZE",
    "Dialect",
    "build_tokenizer",
]

PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = 0, 1, 2, 3
VOCABULARY_SIZE = 512  # of the two models that share a decoder: a multiple of 64
_WORDS = VOCABULARY_SIZE - 8


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a model family writes a chat.

    Attributes:
        specials: Names of the first ids: padding, begin, end and image come first.
        chat_template: The jinja template that renders a conversation.
        placeholder: What the family's processor puts around the tokens of an image.
        header: What the template puts before a user's text.
        reply: What it puts between a user's text and the answer to it.
        tile_marker: What the family's processor puts before the tokens of a tile, or `None` where
            it cuts no pictures.
    """

    specials: tuple[str, ...]
    chat_template: str
    placeholder: tuple[str, str]
    header: str
    reply: str
    tile_marker: str | None = None

    @property
    def vocabulary_size(self) -> int:
        """Rows of a model's table: the same words for every dialect, after its special tokens.

        Rounded up to a multiple of 32, which suits groups of weights.
        """
        return -(-(_WORDS + len(self.specials)) // 32) * 32


# Neither template leaves work to a tokenizer post-processor: the text that it renders holds every
# special token, so rendering then encoding and encoding in one go cannot disagree.
_SMOL = Dialect(
    specials=(
        "<|endoftext|>",
        "<|im_start|>",
        "<end_of_utterance>",
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<reserved_6>",
        "<reserved_7>",
    ),
    chat_template=(
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}Assistant:\n{% else %}User:{% endif %}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{{ '\n' }}{% endif %}"
    ),
    placeholder=("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    header="User:",
    reply="<end_of_utterance>Assistant:\n",
)

SCENE_DIALECTS = ("pocket-llava", "pocket-smol")
"""Of the models that see one scene at a time, and share a decoder."""
DIALECTS: dict[str, Dialect] = {
    "pocket-llava": Dialect(
        specials=("<pad>", "<s>", "</s>", "<image>", *(f"<reserved_{i}>" for i in range(4, 8))),
        chat_template=(
            "{{ bos_token }}{% for message in messages %}"
            "{% if message['role'] == 'assistant' %}ASSISTANT:\n{% else %}USER:{% endif %}"
            "{% if message['content'] is string %}{{ message['content'] }}"
            "{% else %}{% for item in message['content'] %}"
            "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}"
            "{% endfor %}{% endif %}"
            "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{{ '\n' }}{% endif %}"
        ),
        placeholder=("", ""),
        header="USER:",
        reply="\nASSISTANT:\n",
    ),
    "pocket-smol": _SMOL,
    "pocket-tiles": replace(
        _SMOL,
        specials=(
            *_SMOL.specials[:-2],
            *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
            *(f"<reserved_{i}>" for i in range(10, 16)),
        ),
        tile_marker="<fake_token_around_image><row_{row}_col_{column}>",
    ),
}


def _grammar_text() -> list[str]:
    """Lines in which every word of the grammar occurs, with and without a space before it."""
    rng = np.random.default_rng(0)
    lines = ["USER:\n", "ASSISTANT:\n", "User:", "Assistant:\n"]
    for _ in range(300):
        scene = sample_scene(rng, word_probability=0.9)
        for form in FORMS:
            lines += [f"{q.text}\n{q.answer}" for q in questions_about(scene, form)]
    vocabulary = (*COLORS, *SHAPES, *SIZES, *WORDS)
    lines += [f"{word} {word}" for word in vocabulary] * 50
    return lines


def build_tokenizer(model_name: str) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of one reference model, without any file.

    Args:
        model_name: A key of ``DIALECTS``.
    """
    dialect = DIALECTS[model_name]
    neutral = [f"<special_{i}>" for i in range(len(dialect.specials))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_WORDS + len(dialect.specials),
        special_tokens=neutral,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_grammar_text(), trainer)
    # The same merges for both families: only the names of the special tokens differ.
    trained = json.loads(tokenizer.to_str())["model"]
    vocabulary, merges = trained["vocab"], [tuple(pair) for pair in trained["merges"]]
    for index, name in enumerate(dialect.specials):
        del vocabulary[neutral[index]]
        vocabulary[name] = index
    dressed = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    dressed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    dressed.decoder = decoders.ByteLevel()
    dressed.add_special_tokens([AddedToken(name, special=True) for name in dialect.specials])
    pad, bos, eos, image = dialect.specials[:4]
    return PreTrainedTokenizerFast(
        tokenizer_object=dressed,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": image},
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=1024,
    )
