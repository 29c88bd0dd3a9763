"""Tiny random models of both families with blocks to spare, and what whole passes say of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional

from pocketvlm.calibration import CalibrationSet
from pocketvlm.calibration.data.prompts import encode_samples
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.reference.random_models import tiny_config, write_random_model
from pocketvlm.reference_graph.forward import decode_logits, embed_prompts, encode_images
from pocketvlm.weights.dense import DenseWeight

DECODER, TOWER = 4, 3


def write_tall(family: str, path: Path, feature_layer: int = -2) -> Path:
    """Four blocks in the decoder, three that are run in the tower; LLaVA's has one after them."""
    config = tiny_config(family)
    config["text_config"]["num_hidden_layers"] = DECODER
    config["vision_config"]["num_hidden_layers"] = TOWER + (family == "llava")
    if family == "llava":
        config["vision_feature_layer"] = feature_layer
    write_random_model(config, path)
    return path


def silence(checkpoint: Checkpoint, block: str) -> None:
    """Makes a block pass on what it gets: its two writers to the residual stream write zeros."""
    for role in ("self_attn.o_proj", "self_attn.out_proj", "mlp.down_proj", "mlp.fc2"):
        name = f"{block}.{role}"
        if name in {linear.name for linear in checkpoint.spec.linears()}:
            layer = checkpoint.layer(name)
            checkpoint.set_form(name, DenseWeight(values=torch.zeros(layer.form.shape)))
            if getattr(layer, "bias", None) is not None:
                layer.bias.zero_()


def answer_losses(checkpoint: Checkpoint, samples: CalibrationSet) -> list[float]:
    """Mean cross-entropy of each sample's answer, by one whole pass for each."""
    found = []
    for sample, prompt in zip(samples, encode_samples(checkpoint.processor, samples), strict=True):
        ids = torch.tensor([prompt.token_ids])
        with torch.inference_mode():
            visual = encode_images(checkpoint, checkpoint.processor.pixels([sample.open_image()]))
            logits = decode_logits(checkpoint, embed_prompts(checkpoint, ids, visual))[0].double()
        tokens = range(prompt.answer_start, prompt.answer_end)
        predicted = functional.log_softmax(logits, dim=-1)
        found.append(-sum(float(predicted[at - 1, ids[0, at]]) for at in tokens) / len(tokens))
    return found
