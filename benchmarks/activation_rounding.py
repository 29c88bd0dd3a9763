"""What int8 activations cost a decoder's logits, by kind of layer, in random and learned weights.

    .venv/bin/python benchmarks/activation_rounding.py lfm2-vl internvl3 shape:lfm2-vl-450m
    .venv/bin/python benchmarks/activation_rounding.py --learn 200

Names are tiny models of the tests, and whatever `plan` takes. Their weights stay floats, so that
rounding is all that differs. `--learn` trains two small language models on this repository's
documentation, byte by byte, one with short convolutions and one without, from the random weights
that shapes have: what learning changes is then the only difference.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.pipeline.sources import resolve_model
from pocketvlm.reference.random_models import TINY_MODELS, write_tiny_model
from pocketvlm.reference_graph.activation_rounding import round_per_block
from pocketvlm.reference_graph.forward import DecoderInputs, decode_logits, embed_text

BLOCK = 32
"""Channels that share a scale: the groups of `int4-small`."""

KINDS: dict[str, Callable[[str], bool]] = {
    "all": lambda _: True,
    "short convolutions": lambda name: ".conv." in name,
    "all but these": lambda name: ".conv." not in name,
    "their last product": lambda name: ".conv.out_proj" in name,
    "feed-forward networks": lambda name: ".feed_forward." in name or ".mlp." in name,
}
STEPS = (0, 20, 60, 120, 200, 500, 1000)


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="tiny models, or what `plan` takes")
    parser.add_argument("--rows", type=int, default=24, help="random tokens of the prompt")
    parser.add_argument("--learn", type=int, default=0, help="steps of training")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            table[name] = measure_checkpoint(load(name, Path(folder)), options.rows)
            print(f"{name}: {describe(table[name])}", flush=True)
    if options.learn:
        table["learned"] = learn(options.learn)
    print(json.dumps(table))


def load(name: str, folder: Path) -> Checkpoint:
    """A checkpoint; a tiny model is written below `folder` first."""
    if name not in TINY_MODELS:
        return Checkpoint.load(resolve_model(name))
    write_tiny_model(name, folder / name)
    return Checkpoint.load(folder / name)


def measure_checkpoint(checkpoint: Checkpoint, rows: int) -> dict[str, float]:
    """Decibels of the logits after every row of a prompt of random tokens, by what is rounded."""
    decoder = checkpoint.spec.decoder
    names = [linear.name for linear in checkpoint.spec.linears() if linear.part == "decoder"]
    layers = {name: checkpoint.layer(name) for name in [*names, decoder.head]}
    ids = torch.randint(10, 250, (1, rows), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        inputs = DecoderInputs(
            embeds=embed_text(checkpoint, ids),
            positions=torch.arange(rows).expand(decoder.rope.axes, 1, rows).clone(),
            is_visual=torch.zeros(1, rows, dtype=torch.bool),
            next_position=torch.tensor([rows]),
        )
        return measure(layers, lambda: decode_logits(checkpoint, inputs)[0])


def measure(layers: Mapping[str, nn.Module], run: Callable[[], Tensor]) -> dict[str, float]:
    """Decibels by kind of layer that is rounded; kinds that a model lacks are left out."""
    exact = run().double()
    found = {}
    for kind, is_of_kind in KINDS.items():
        chosen = [layer for name, layer in layers.items() if is_of_kind(name)]
        if not chosen or (kind == "all but these" and len(chosen) == len(layers)):
            continue
        hooks = [layer.register_forward_pre_hook(_round) for layer in chosen]
        found[kind] = decibels(run().double(), exact)
        for hook in hooks:
            hook.remove()
    return found


def _round(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (round_per_block(inputs[0], BLOCK),)


def decibels(found: Tensor, exact: Tensor) -> float:
    """Signal to noise of what differs from position to position.

    What the logits of all positions have in common says nothing about a prompt, and is what a
    model learns first.
    """
    varying = exact - exact.mean(dim=tuple(range(exact.ndim - 1)))
    return round(float(20 * torch.log10(varying.norm() / (found - exact).norm())), 1)


def describe(found: dict[str, float]) -> str:
    """One line of a table."""
    return ", ".join(f"{kind} {value:.1f} dB" for kind, value in found.items())


def learn(steps: int) -> list[dict[str, Any]]:
    """Trains both models, and measures them on text that is held out, on the way."""
    text = b"".join(path.read_bytes() for path in sorted(Path("docs").rglob("*.md")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    border = len(data) * 9 // 10
    held_out = draw(data[border:], 8, torch.Generator().manual_seed(1))[:, :-1]
    rows = []
    for name, model in small_models().items():
        layers = {
            str(key): part for key, part in model.named_modules() if isinstance(part, nn.Linear)
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        generator, loss = torch.Generator().manual_seed(2), torch.tensor(float("nan"))
        for step in range(steps + 1):
            if step in STEPS:
                with torch.no_grad():
                    found = measure(layers, partial(_logits, model, held_out))
                rows.append({"model": name, "step": step, "loss": float(loss.detach()), **found})
                print(f"{name}, {step} steps, loss {loss:.2f}: {describe(found)}", flush=True)
            tokens = draw(data[:border], 12, generator)
            logits = model(tokens[:, :-1]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return rows


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens).logits
    return logits


def draw(data: Tensor, count: int, generator: torch.Generator, length: int = 65) -> Tensor:
    """Pieces of the text, [count, length]."""
    starts = torch.randint(0, len(data) - length, (count,), generator=generator)
    return torch.stack([data[start : start + length] for start in starts])


def small_models() -> dict[str, nn.Module]:
    """Eight layers of 96 channels, with and without short convolutions."""
    from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    conv, attention = "conv", "full_attention"
    layers = [conv, conv, attention, conv, conv, attention, conv, attention]
    lfm2 = Lfm2Config(**sizes, layer_types=layers, block_auto_adjust_ff_dim=False)
    models = {"lfm2": Lfm2ForCausalLM(lfm2), "llama": LlamaForCausalLM(LlamaConfig(**sizes))}
    for model in models.values():
        randomize(model.named_parameters())
    return models


def randomize(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Values as those of a shape (`reference/random_models.py`)."""
    generator = torch.Generator().manual_seed(0)
    for name, values in parameters:
        noise = torch.randn(values.shape, generator=generator)
        if values.ndim == 1:
            values.data = 1 + 0.05 * noise
        else:
            values.data = noise * (0.02 if "embed" in name else values[0].numel() ** -0.5)


if __name__ == "__main__":
    main()
