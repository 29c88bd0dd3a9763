"""The packages compute what torch computes, in the project's evaluator of MIL programs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.emulation.mil.package import MilPackage
from pocketvlm.emulation.mil.program import MilProgram
from pocketvlm.export.torch_graphs import DecoderGraph
from tests.export.coreml.rig import Decoder, export, run_vision
from tests.export.coreml.test_codes import mix_forms
from tests.export.rig import ReceivedAttention, make_prompt

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

CAPACITY = 64
# Of the largest value: embeddings, and logits after rows of the cache.
BOUNDS = {"float32": (1e-5, 1e-5), "float16": (4e-3, 6e-3)}


def difference(found: np.ndarray, expected: torch.Tensor) -> float:
    wanted = expected.numpy()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


class TorchDecoder:
    """The definition, called the same way."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        spec = checkpoint.spec.decoder
        shape = (1, spec.kv_heads, CAPACITY, spec.head_dim)
        self.graph = DecoderGraph(checkpoint)
        self.cache = [torch.zeros(shape) for _ in range(2 * spec.depth)]
        self.length = 0

    def __call__(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            past = torch.tensor([self.length])
            logits, *self.cache = self.graph(embeds, positions, past, *self.cache)
        self.length += embeds.shape[1]
        return logits[0, 0]


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("forms", ["dense", "mixed"])
def test_both_packages(
    tiny_checkpoint: Checkpoint, tmp_path: Path, precision: str, forms: str
) -> None:
    checkpoint = tiny_checkpoint
    if forms == "mixed":
        checkpoint = mix_forms(checkpoint)
    checkpoint = replace(checkpoint, reducer=ReceivedAttention(keep=5, positions="original"))
    folder = export(checkpoint, tmp_path, precision=precision)
    close, cached = BOUNDS[precision]

    pixels, visual, prompt = make_prompt(checkpoint)
    seen = run_vision(folder / "vision.mlpackage", pixels.numpy())
    assert difference(seen["embeds"], visual.embeds) < close
    np.testing.assert_array_equal(seen["indices"], visual.indices)

    # Kept tokens keep their positions, so that there are gaps; the prompt is not a multiple of 8.
    decoder, definition = Decoder(folder / "decoder.mlpackage"), TorchDecoder(checkpoint)
    logits = decoder.prefill(prompt.embeds.numpy(), prompt.positions.numpy())
    assert prompt.embeds.shape[1] % decoder.chunk
    assert difference(logits, definition(prompt.embeds, prompt.positions)) < cached
    table = checkpoint.model.get_submodule(checkpoint.spec.decoder.embedding)
    for step, token in enumerate((7, 300, 12)):
        embeds = table(torch.tensor([[token]]))
        assert difference(decoder.embed([token]), embeds) < close
        position = prompt.next_position.view(1, 1) + step
        logits = decoder.decode(embeds.numpy(), position.numpy())
        assert difference(logits, definition(embeds, position)) < cached


def test_a_second_turn_overwrites_the_padding_of_the_first(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = export(tiny_checkpoint, tmp_path, precision="float32")
    decoder, definition = Decoder(folder / "decoder.mlpackage"), TorchDecoder(tiny_checkpoint)
    generator = torch.Generator().manual_seed(0)
    start = 0
    for rows in (11, 3, 9):
        embeds = torch.randn(1, rows, 64, generator=generator) * 0.1
        positions = torch.arange(start, start + rows)[None]
        logits = decoder.prefill(embeds.numpy(), positions.numpy())
        assert difference(logits, definition(embeds, positions)) < 1e-5
        start += rows


def test_ios17_passes_its_cache(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = export(tiny_checkpoint, tmp_path, precision="float32", deployment="iOS17")
    program = MilProgram(MilPackage.open(folder / "decoder.mlpackage"))
    embedding = MilProgram(MilPackage.open(folder / "embedding.mlpackage"))
    definition = TorchDecoder(tiny_checkpoint)
    spec = tiny_checkpoint.spec.decoder
    shape = (spec.depth, spec.kv_heads, CAPACITY, 2 * 32)
    cache = {name: np.zeros(shape, np.float32) for name in ("key_cache", "value_cache")}
    past = 0
    for ids in ([5, 6, 7, 8, 9], [10], [11, 12]):
        padded = np.zeros((1, 8), np.int32)
        padded[0, : len(ids)] = ids
        rows = embedding.run("main", {"input_ids": padded})["embeds"]
        positions = np.arange(past, past + 8, dtype=np.int32)[None]
        outputs = program.run(
            "main",
            {
                "embeds": rows,
                "position_ids": positions,
                "past_length": np.array([past], np.int32),
                "length": np.array([len(ids)], np.int32),
                **cache,
            },
        )
        cache = {name: outputs[f"{name}_out"] for name in cache}
        past += len(ids)
        real = torch.from_numpy(rows[:, : len(ids)].copy())
        expected = definition(real, torch.from_numpy(positions[:, : len(ids)].astype(np.int64)))
        assert difference(outputs["logits"][0, 0], expected) < 1e-5


def test_large_activations_survive_float16(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Squares of 2,000 are beyond float16; a root mean square must not notice."""
    folder = export(tiny_checkpoint, tmp_path)
    decoder, definition = Decoder(folder / "decoder.mlpackage"), TorchDecoder(tiny_checkpoint)
    embeds = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1))
    embeds[:, :, 3] = 2000.0
    positions = torch.arange(6)[None]
    logits = decoder.prefill(embeds.numpy(), positions.numpy())
    assert np.isfinite(logits).all()
    assert difference(logits, definition(embeds, positions)) < 0.02
