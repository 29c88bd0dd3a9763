"""Stock models with the weights of a checkpoint: the oracle for what these weights mean."""

from __future__ import annotations

import torch
from torch import nn

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.weights.modules import FormEmbedding, FormLinear


def stock_of(checkpoint: Checkpoint) -> nn.Module:
    """The model that transformers builds from a checkpoint's config.json, with its weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(**checkpoint.config), dtype=torch.float32, attn_implementation="sdpa"
    )
    tensors = {name: value.detach() for name, value in checkpoint.model.named_parameters()}
    for name, module in checkpoint.model.named_modules():
        if isinstance(module, FormLinear | FormEmbedding):
            tensors[f"{name}.weight"] = module.weight
    model.load_state_dict(tensors)
    return model.eval()
