"""The C++ runner's tokenizer beside the tokenizers library, on texts that its rules differ in."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from pocketvlm.bundle import Bundle

Runner = tuple[str, ...]
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
STEPS = {
    "gpt2": GPT2,
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "qwen": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), BYTES]),
    "llama": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA), "isolated"), BYTES]),
}
WORDS = (
    *("it's", "IT'S", "we'll", " don't", "'", "a", " the", "Straße", "naïve", "漢字", "हिन्दी"),
    *(
        "ไทย",
        "\u0639\u0631\u0628\u064a",
        "12345",
        "٣",
        "½",
        "Ⅷ",
        "3.14",
        "foo_bar",
        "!?…",
        "🎈👩\u200d👧",
    ),
    *(
        " ",
        "  ",
        "\n",
        "\r\n",
        " \n ",
        "\t",
        "\u00a0",
        "\u3000",
        "<image>",
        "<|im_start|>",
        "<|im_st",
    ),
)


@pytest.fixture(params=STEPS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """A byte-level BPE with one kind of pre-tokenizer."""
    made = Tokenizer(models.BPE(ignore_merges=request.param == "llama"))
    made.pre_tokenizer = STEPS[request.param]
    made.decoder = decoders.ByteLevel()
    if request.param == "qwen":
        made.normalizer = normalizers.NFC()
    trainer = BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(word) for word in ("<|im_start|>", "<image>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" ".join(WORDS) * 3, "the don't 12345 naïve"], trainer)
    if request.param == "llama":
        made.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
        )
    return made


def copied(bundle: Bundle, folder: Path) -> Path:
    """The parts of a bundle that the tokenizer stands among, with a manifest to be changed."""
    folder.mkdir()
    for file in bundle.path.glob("*.json"):
        shutil.copy(file, folder)
    return folder


def edit(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    document = json.loads((folder / name).read_text(encoding="utf-8"))
    change(document)
    (folder / name).write_text(json.dumps(document), encoding="utf-8")


def tokens_of(runner: Runner, folder: Path, texts: Sequence[str]) -> list[list[int]]:
    words = [word for text in texts for word in ("--rendered", text)]
    done = subprocess.run([*runner, folder, *words, "--tokens"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_tokens_are_those_of_the_library(
    tokenizer: Tokenizer, runner: Runner, make_bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    folder = copied(make_bundle("pocket-llava"), tmp_path / "bundle")
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder, "tokenizer_config.json", lambda config: config.pop("bos_token"))

    def name_image(manifest: dict) -> None:
        manifest["prompt"] |= {"image_token_id": 1, "image_mark": "[picture]"}
        manifest["prompt"]["embedding_rows"] = None

    edit(folder, "manifest.json", name_image)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(400)]
    expected = [tokenizer.encode(text).ids for text in texts]
    assert tokens_of(runner, folder, texts) == expected


def test_text_that_is_not_in_normal_form_is_refused(
    runner: Runner, make_bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    folder = copied(make_bundle("pocket-llava"), tmp_path / "bundle")
    edit(folder, "tokenizer.json", lambda document: document.update(normalizer={"type": "NFC"}))
    words = ("--rendered", "nai\u0308ve", "--tokens")
    done = subprocess.run([*runner, folder, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "normal form C" in done.stderr


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("normalizer", {"type": "Lowercase"}, "normalizer Lowercase is not known"),
        ("decoder", {"type": "WordPiece"}, "a decoder other than ByteLevel"),
        ("pre_tokenizer", {"type": "Metaspace"}, "pre_tokenizer Metaspace is not known"),
        ("pre_tokenizer", None, "not byte-level"),
        (
            "pre_tokenizer",
            {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False},
            "Split with the pattern x+ is not known",
        ),
        ("post_processor", {"type": "RobertaProcessing"}, "post_processor RobertaProcessing"),
        ("model", {"type": "Unigram", "vocab": []}, "model Unigram is not known"),
    ],
)
def test_parts_that_are_not_known_are_refused_by_name(
    part: str,
    value: object,
    reason: str,
    runner: Runner,
    make_bundle: Callable[[str], Bundle],
    tmp_path: Path,
) -> None:
    folder = copied(make_bundle("pocket-llava"), tmp_path / "bundle")
    edit(folder, "tokenizer.json", lambda document: document.update({part: value}))
    words = ("--rendered", "a", "--tokens")
    done = subprocess.run([*runner, folder, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {folder / 'tokenizer.json'}: ")
    assert reason in line
