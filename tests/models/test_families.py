"""Families are data: one reader each, and nothing else in the package knows a name of theirs."""

from __future__ import annotations

import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest
from torch import nn

import pocketvlm
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.checkpoint.config import read_spec
from pocketvlm.models.families.table import FAMILIES
from pocketvlm.reference.random_models import TINY_MODELS, tiny_config
from tests.stock import stock_of

ROOT = Path(pocketvlm.__file__).parent
MODULES = re.compile(
    r"\b(self_attn|[qkvo]_proj|out_proj|gate_proj|up_proj|down_proj|fc[12]|layer_norm[12]"
    r"|input_layernorm|post_attention_layernorm|post_layernorm|pre_layrnorm"
    r"|patch_embedding|class_embedding|position_embedding|rotary_emb|multi_modal_projector"
    r"|modality_projection|vision_tower|language_model|lm_head"
    r"|projection_layer|cls_token|lambda_[12]|operator_norm|embedding_norm|in_proj"
    r"|post_self_attn_layernorm|post_mlp_layernorm|gate_up_proj|post_projection_norm)\b"
)
FAMILY = re.compile(
    r"^(llava|idefics3|smolvlm|internvl|paligemma|gemma[23]?|gemma3_text|got_ocr2|clip"
    r"|clip_vision_model|siglip|llama|qwen[23]|lfm2|lfm2_vl|siglip2_vision_model"
    r"|qwen_vl|glm_ocr|paddleocr_vl)$"
)
MAY_KNOW = {
    "models/families/": "what readers are for",
    "models/spec.py": "fields of the description have the same names",
    "reference/": "the shipped models: how they are built and trained",
    "models/images/": "kinds of image processors, told apart by their own classes",
    "checkpoint/names.py": "buffers that every stock model computes itself",
}


FIELDS = re.compile(r"(?<=tower\.)\w+|^(class|patch|position)_embedding$")  # of `TowerSpec`


def _without_fields(text: str) -> str:
    return FIELDS.sub("", text)


def strings(file: Path) -> list[str]:
    """Texts and names of a module's code; its comments and docstrings may speak of anything."""
    found, before = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline):
        starts_line = before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)
        if (
            token.type == tokenize.NAME
            or (token.type == tokenize.STRING and not starts_line)
            or token.type == getattr(tokenize, "FSTRING_MIDDLE", -1)
        ):
            found.append(token.string)
        if token.type != tokenize.COMMENT:
            before = token.type
    return found


MOST_LINES = 150
"""Of a module that reads a family's config.json."""


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_costs_one_short_module(model_type: str):
    module = Path(inspect.getfile(FAMILIES[model_type]))
    assert module.parent == ROOT / "models" / "families"
    assert len(module.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_nothing_else_knows_a_module_or_a_family():
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if name.startswith(tuple(MAY_KNOW)):
            continue
        for text in strings(file):
            found = MODULES.search(_without_fields(text))
            is_text = text[-1:] in "\"'"
            if found or (is_text and FAMILY.match(text.strip("\"'"))):
                wrong.append(f"{name}: {text[:60]}")
    assert not wrong


def test_what_may_know_is_there():
    assert all((ROOT / name).exists() for name in MAY_KNOW)


def test_every_name_of_a_spec_is_one_of_the_stock_model(tiny_checkpoint: Checkpoint):
    spec, model = tiny_checkpoint.spec, stock_of(tiny_checkpoint)
    tower, decoder = spec.tower, spec.decoder
    names = [tower.prefix, tower.embeddings, tower.patch_embedding, tower.position_embedding]
    names += [tower.post_norm, tower.stack, *(name for name in (tower.pre_norm,) if name)]
    names += [decoder.prefix, decoder.embedding, decoder.stack, decoder.norm]
    names += [decoder.head, *spec.projector.linears]
    for block in (*tower.blocks, *decoder.blocks):
        for sublayer in (block.attention, block.ffn):
            names += [sublayer.module, sublayer.norm, *sublayer.inputs, sublayer.output]
            assert all(name.startswith(f"{sublayer.module}.") for name in sublayer.inputs)
        names.append(block.module)
    for name in names:
        assert isinstance(model.get_submodule(name), nn.Module)
    if tower.class_embedding is not None:
        owner = model.get_submodule(tower.embeddings)
        assert isinstance(getattr(owner, tower.class_embedding), nn.Parameter)
    assert len(model.get_submodule(tower.stack)) == tower.depth
    assert len(model.get_submodule(decoder.stack)) == decoder.depth


def reads(model_type: str, name: str) -> bool:
    """Whether the reader of a type reads a tiny model."""
    return FAMILIES[tiny_config(name)["model_type"]] is FAMILIES[model_type]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_reader_tells_a_processor_that_stock_has(model_type: str):
    import transformers

    own = [name for name in TINY_MODELS if tiny_config(name)["model_type"] == model_type]
    name = next(iter(own or [name for name in TINY_MODELS if reads(model_type, name)]))
    spec = read_spec({**tiny_config(name), "model_type": model_type})
    assert spec.model_type == model_type
    named = (*spec.processor.classes, *filter(None, [spec.processor.stand_in]))
    assert all(hasattr(transformers, name) for name in named)
