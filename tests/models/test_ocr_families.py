"""GLM-OCR and PaddleOCR-VL: folders as they are published, and configurations that are refused."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from pocketvlm.checkpoint import Checkpoint, read_model_folder
from pocketvlm.checkpoint.config import read_config, read_spec
from pocketvlm.checkpoint.folding import apply_fold
from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.models.folds import FlattenKernel, PairsToHalves
from pocketvlm.pipeline.source_check import verify_folder
from pocketvlm.reference.random_models import tiny_config, write_tiny_model
from pocketvlm.reference.shapes import load_shape

FORMER = (
    (r"^model\.projector", "mlp_AR"),
    (r"^model\.visual", "visual"),
    (r"^model\.language_model", "model"),
)
"""Names of PaddleOCR-VL's published weights: what stock renames, read backwards."""


def write_published(folder: Path, *, head: bool) -> None:
    """A tiny PaddleOCR-VL as its repository has it: decoder's keys at the top, former names."""
    write_tiny_model("paddleocr-vl", folder)
    config = tiny_config("paddleocr-vl")
    text, vision = config.pop("text_config"), config["vision_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = {**rope, "type": "default"}
    flat = {**text, **config, "vision_config": {**vision, "model_type": "paddleocr_vl"}}
    flat["tie_word_embeddings"] = not head
    (folder / "config.json").write_text(json.dumps(flat))
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, values in tensors.items():
        for current, former in FORMER:
            if re.search(current, name):
                renamed[re.sub(current, former, name)] = values
                break
    assert len(renamed) == len(tensors)
    renamed["visual.vision_model.embeddings.packing_position_embedding.weight"] = torch.ones(9, 64)
    renamed["visual.vision_model.head.probe"] = torch.ones(1, 1, 64)
    if head:
        table = renamed["model.embed_tokens.weight"]
        renamed["lm_head.weight"] = table.flip(0).contiguous()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("head", [False, True])
def test_a_folder_as_it_was_published_is_read_as_stock_reads_it(tmp_path, head):
    write_published(tmp_path / "flat", head=head)
    folder = read_model_folder(tmp_path / "flat")
    assert folder.spec.decoder.tied_head == (not head)
    assert any("packing_position_embedding" in note for note in folder.notes)
    report = verify_folder(tmp_path / "flat")
    assert report.verdict == "passed", report.lines()
    checkpoint = Checkpoint.load(tmp_path / "flat")
    checkpoint.save(tmp_path / "saved")
    again = Checkpoint.load(tmp_path / "saved")
    assert asdict(again.spec) == asdict(checkpoint.spec)
    assert again.config["text_config"]["hidden_size"] == 64
    if not head:
        write_tiny_model("paddleocr-vl", tmp_path / "nested")
        nested = Checkpoint.load(tmp_path / "nested")
        assert asdict(nested.spec) == asdict(checkpoint.spec)
        before, after = nested.vectors(), checkpoint.vectors()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("qwen2-vl", "mrope"), ("qwen2.5-vl", "mrope"), ("llava", "default"), ("glm-ocr", "default")],
)
def test_positions_are_read_from_their_former_keys(name, kind):
    """As published files of transformers 4 have them, those of Qwen2-VL among others."""
    text = dict(tiny_config(name)["text_config"])
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    del rope["rope_type"]
    former = {**tiny_config(name), "text_config": {**text, "rope_scaling": {**rope, "type": kind}}}
    assert asdict(read_spec(former)) == asdict(read_spec(tiny_config(name)))


def test_a_layer_that_guesses_further_tokens_is_ignored_as_stock_ignores_it(tmp_path):
    write_tiny_model("glm-ocr", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "model.language_model.layers.2"
    tensors[f"{layer}.eh_proj.weight"] = torch.ones(64, 128)
    tensors[f"{layer}.self_attn.q_proj.weight"] = torch.ones(128, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    notes = read_model_folder(tmp_path).notes
    assert any("eh_proj" in note and "ignored" in note for note in notes)
    assert Checkpoint.load(tmp_path).spec.decoder.depth == 2


def test_own_code_of_a_model_that_stock_has_is_told_what_leaves_it_out(tmp_path):
    write_tiny_model("paddleocr-vl", tmp_path)
    config = {**tiny_config("paddleocr-vl"), "auto_map": {"AutoConfig": "configuration.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="never run.*itself has a class.*save") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def changed(name: str, part: str, **values: Any) -> dict[str, Any]:
    config = tiny_config(name)
    return {**config, part: {**config[part], **values}}


ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
HALF = {**ROPE, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            changed("glm-ocr", "text_config", rope_parameters=HALF),
            r"partial_rotary_factor 0\.5 is not supported; supported is 1\.0",
        ),
        (changed("glm-ocr", "vision_config", attention_bias=False), "attention_bias must be true"),
        (
            changed("glm-ocr", "vision_config", out_hidden_size=96),
            "the tower ends in 96 channels and the decoder has 64",
        ),
        (
            changed("glm-ocr", "vision_config", temporal_patch_size=1),
            "temporal_patch_size 2",
        ),
        (
            changed("paddleocr-vl", "text_config", layer_types=["sliding_attention"] * 2),
            "sliding attention",
        ),
    ],
)
def test_what_has_no_field_is_refused_in_one_line(config, message):
    with pytest.raises(UnsupportedError, match=message) as caught:
        read_spec(config)
    assert "\n" not in str(caught.value)


def test_a_table_of_positions_that_a_model_does_not_have_has_no_size():
    """GLM-OCR's class has `image_size`, and uses it for nothing."""
    other = read_spec(changed("glm-ocr", "vision_config", image_size=28))
    assert asdict(other) == asdict(read_spec(tiny_config("glm-ocr")))


def test_pixels_of_the_published_models_count_as_their_processors_say():
    for name in ("glm-ocr", "paddleocr-vl"):
        spec = load_shape(name).spec
        assert (spec.tower.height, spec.tower.width, spec.visual_tokens) == (448, 448, 256)


def test_a_convolution_over_cells_is_a_linear_of_merged_patches():
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 3, 2, 2, generator=generator)
    cells = torch.randn(4, 2, 2, 3, generator=generator)  # [cells, rows, columns, channels]
    expected = functional.conv2d(cells.permute(0, 3, 1, 2), kernel).flatten(1)
    (weight,) = apply_fold(FlattenKernel(target="w"), [kernel])
    torch.testing.assert_close(functional.linear(cells.flatten(1), weight), expected)


def test_heads_whose_halves_turn_have_the_products_of_heads_whose_neighbours_turn():
    from transformers.models.glm_ocr.modeling_glm_ocr import apply_rotary_pos_emb
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as turn_halves

    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2 * 8, 6, generator=generator) for _ in range(2)]
    inputs = torch.randn(1, 5, 6, generator=generator)
    angles = torch.randn(1, 5, 4, generator=generator)
    pairs, halves = angles.repeat_interleave(2, dim=-1), torch.cat([angles, angles], dim=-1)

    def heads(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        return [(inputs @ w.T).view(1, 5, 2, 8).transpose(1, 2) for w in matrices]

    folded = [apply_fold(PairsToHalves(target="w", width=8), [weight])[0] for weight in weights]
    query, key = apply_rotary_pos_emb(*heads(weights), pairs.cos(), pairs.sin())
    ours, other = turn_halves(*heads(folded), halves.cos(), halves.sin())
    torch.testing.assert_close(ours @ other.mT, query @ key.mT)
    assert not np.allclose(ours, query)
