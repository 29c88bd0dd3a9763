"""Forward passes for training: the stock modules, in shapes that run fast on a CPU.

They compute what the transformers classes compute, for packed sequences and fixed shapes, in a form
that ``torch.compile`` fuses: written out, a step takes less than half the time. The tests compare
the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from torch import Tensor
from transformers import LlamaModel, LlavaForConditionalGeneration, PreTrainedModel

__all__ = ["Vision", "decode_packed", "look", "normalise_pixels", "packed_bias"]

_MASKED = -1e4  # small enough to vanish in a softmax, large enough for bfloat16


@dataclass(frozen=True, kw_only=True)
class Vision:
    """What a tower says about a batch of images.

    Attributes:
        tokens: Visual tokens in the decoder's space, ``(batch, tokens, hidden)``.
        summaries: States that stand for the whole image: CLS at the feature layer and at the end,
            or none for a tower without CLS.
    """

    tokens: Tensor
    summaries: tuple[Tensor, ...]


def normalise_pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Does what the image processor does to pictures of canvas size, on a uint8 batch."""
    shift = 255 * torch.tensor(mean)
    scale = 255 * torch.tensor(std)
    return ((images.float() - shift) / scale).permute(0, 3, 1, 2).contiguous()


def look(model: PreTrainedModel, pixels: Tensor) -> Vision:
    """Runs the tower and the projector of either reference model."""
    if isinstance(model, LlavaForConditionalGeneration):
        return _look_llava(model, pixels)
    core = model.model
    tower = core.vision_model
    patches = F.unfold(pixels, tower.patch_size, stride=tower.patch_size).transpose(1, 2)
    weight, bias = tower.embeddings.patch_embedding.weight, tower.embeddings.patch_embedding.bias
    states = F.linear(patches, weight.flatten(1), bias)
    states = states + tower.embeddings.position_embedding.weight
    for layer in tower.encoder.layers:
        states = layer(states, None)
    return Vision(tokens=core.connector(tower.post_layernorm(states)), summaries=())


def _look_llava(model: LlavaForConditionalGeneration, pixels: Tensor) -> Vision:
    tower = model.model.vision_tower
    states = tower.pre_layrnorm(tower.embeddings(pixels))
    *layers, last = tower.encoder.layers
    for layer in layers:
        states = layer(states, None)
    final = tower.post_layernorm(last(states, None)[:, 0])
    return Vision(
        tokens=model.model.multi_modal_projector(states[:, 1:]), summaries=(states[:, 0], final)
    )


def packed_bias(segments: Tensor) -> Tensor:
    """Additive attention bias of packed sequences, ``(batch, 1, 1, length, length)``.

    A token sees the tokens before it in its own segment and in segment 0, which holds the image.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    seen = causal & (same | (segments[:, None, :] == 0))
    bias = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, _MASKED)
    return bias[:, None, None]


def decode_packed(
    decoder: LlamaModel, states: Tensor, bias: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Runs the decoder on packed embeddings and returns its normed final states.

    Args:
        decoder: The Llama stack.
        states: Input embeddings, ``(batch, length, hidden)``.
        bias: What ``packed_bias`` returns.
        cos: Rotary cosines of every position, ``(batch, length, head width)``.
        sin: Rotary sines, likewise.
    """
    config = decoder.config
    batch, length, hidden = states.shape
    width, groups = config.head_dim, config.num_key_value_heads
    heads = config.num_attention_heads
    share = heads // groups
    norm = (hidden,)
    eps = config.rms_norm_eps
    for layer in decoder.layers:
        attention = layer.self_attn
        normed = F.rms_norm(states, norm, layer.input_layernorm.weight, eps).bfloat16()
        queries = attention.q_proj(normed).view(batch, length, heads, width).transpose(1, 2)
        keys = attention.k_proj(normed).view(batch, length, groups, width).transpose(1, 2)
        values = attention.v_proj(normed).view(batch, length, groups, width).transpose(1, 2)
        queries = _rotate(queries, cos, sin) * width**-0.5
        # Queries of one group are stacked along the length: keys need no copy per query head.
        stacked = queries.bfloat16().reshape(batch, groups, share * length, width)
        scores = stacked @ _rotate(keys, cos, sin).bfloat16().transpose(-1, -2)
        scores = scores.view(batch, groups, share, length, length) + bias
        weights = scores.float().softmax(-1).bfloat16().view(batch, groups, share * length, length)
        mixed = (weights @ values).view(batch, heads, length, width).transpose(1, 2)
        states = states + attention.o_proj(mixed.reshape(batch, length, hidden))
        normed = F.rms_norm(states, norm, layer.post_attention_layernorm.weight, eps).bfloat16()
        gated = F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
        states = states + layer.mlp.down_proj(gated)
    return F.rms_norm(states, norm, decoder.norm.weight, eps)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return states * cos[:, None] + turned * sin[:, None]
