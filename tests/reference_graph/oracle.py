"""A decoder in float64, row by row, which hides the keys of dropped rows and computes them all."""

from __future__ import annotations

import math

import torch


@torch.inference_mode()
def oracle_logits(checkpoint, inputs, schedule=None):
    """Logits [batch, length, vocabulary], and by layer which rows it sees, bool [batch, length]."""
    found = [_prompt(checkpoint, inputs, schedule, row) for row in range(len(inputs.embeds))]
    seen = [torch.stack(layers) for layers in zip(*(layers for _, layers in found), strict=True)]
    return torch.stack([logits for logits, _ in found]), seen


def _prompt(checkpoint, inputs, schedule, prompt):
    spec, model = checkpoint.spec, checkpoint.model
    decoder = spec.decoder
    heads, width = decoder.heads // decoder.kv_heads, decoder.head_dim
    hidden, visual = inputs.embeds[prompt].double(), inputs.is_visual[prompt]
    length = len(visual)
    reader = length - 1 if inputs.reader is None else int(inputs.reader[prompt])
    alive, places = torch.ones(length, dtype=torch.bool), inputs.positions[prompt]
    drops = {} if schedule is None else {drop.layers: drop.keep for drop in schedule.drops}
    layers = []

    def dense(name, states):
        return states @ model.get_submodule(name).form.dequantize().double().T

    def norm(name, states):
        module = model.get_submodule(name)
        square = states.square().mean(-1, keepdim=True)
        return states / (square + module.eps).sqrt() * module.weight.double()

    def rotate(states):
        exponents = torch.arange(0, width, 2).double() / width
        angle = places[:, None] * (1.0 / decoder.rope.theta**exponents)
        first, second = states[:, : width // 2], states[:, width // 2 :]
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ],
            dim=-1,
        )

    def attend(block, normed):
        """What every head gives, and its weights."""
        q, k, v = (dense(f"{decoder.stack}.{block}.self_attn.{x}_proj", normed) for x in "qkv")
        mixed, weights = [], []
        for head in range(decoder.heads):
            own = slice(head * width, (head + 1) * width)
            group = slice(head // heads * width, (head // heads + 1) * width)
            scores = rotate(q[:, own]) @ rotate(k[:, group]).T / width**0.5
            hides = torch.ones_like(scores, dtype=torch.bool).triu(1) | ~alive[None]
            # A visual row before all text may see nothing; nothing reads what it becomes.
            weights.append(scores.masked_fill(hides, -1e30).softmax(dim=-1))
            mixed.append(weights[-1] @ v[:, group])
        return torch.cat(mixed, dim=-1), torch.stack(weights)

    def survivors(keep, weights):
        scores = [float(weights[:, reader, column].mean()) for column in range(length)]
        count = math.ceil(int(visual.sum()) * keep / schedule.tokens)
        rest = [column for column in range(length) if visual[column] and alive[column]]
        best = sorted(rest, key=lambda column: -scores[column])[:count]
        return torch.tensor([not visual[i] or i in best for i in range(length)]) & alive

    for block in range(decoder.depth):
        layer = f"{decoder.stack}.{block}"
        normed = norm(f"{layer}.input_layernorm", hidden)
        keep = drops.get(block, 0)
        if keep and schedule.ranked_in == "layer_after":
            alive = survivors(keep, attend(block, normed)[1])
        if block in drops and schedule.positions == "consecutive":
            places = alive.cumsum(0) - 1
        mixed, weights = attend(block, normed)
        layers.append(alive)
        hidden = hidden + dense(f"{layer}.self_attn.o_proj", mixed)
        normed = norm(f"{layer}.post_attention_layernorm", hidden)
        opened = torch.nn.functional.silu(dense(f"{layer}.mlp.gate_proj", normed))
        hidden = hidden + dense(
            f"{layer}.mlp.down_proj", opened * dense(f"{layer}.mlp.up_proj", normed)
        )
        keep = drops.get(block + 1)
        if keep is not None and (keep == 0 or schedule.ranked_in == "layer_before"):
            alive = survivors(keep, weights)
    return dense(decoder.head, norm(decoder.norm, hidden)), layers
