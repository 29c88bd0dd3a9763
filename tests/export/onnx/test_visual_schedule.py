"""Visual rows that leave on the way: the ONNX decoder against torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from pocketvlm.bundle import Bundle, VisualDrop, VisualSchedule
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import InputError, UnsupportedError
from pocketvlm.export.coreml.target import ToCoreml
from pocketvlm.export.executorch.target import ToExecutorch
from pocketvlm.export.onnx.accuracy import agreement_of_levels
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.export.parity.certify import certify
from pocketvlm.export.torch_runner import TorchRunner
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference.random_models import tiny_config, write_random_model
from pocketvlm.runtime.conversation import Conversation
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.weights.kv_cache import KVCacheScales
from tests.export.rig import make_prompt, quantize_checkpoint

LATE = 2


def schedule_of(drops, ranked_in="layer_before", positions="original") -> VisualSchedule:
    return VisualSchedule(
        drops=tuple(VisualDrop(layers=layers, keep=keep) for layers, keep in drops),
        tokens=16,
        ranked_in=ranked_in,
        positions=positions,
    )


SCHEDULES = {
    "ended": VisualSchedule.ending(LATE),
    "before": schedule_of([(1, 9), (2, 4), (3, 0)]),
    "after": schedule_of([(1, 9), (2, 4), (3, 0)], ranked_in="layer_after"),
    "renumbered": schedule_of([(1, 9), (3, 2)], ranked_in="layer_after", positions="consecutive"),
    "renumbered before": schedule_of([(1, 9), (3, 2)], positions="consecutive"),
}


def bundle_of(checkpoint: Checkpoint, path: Path, level: int = 0) -> Bundle:
    target = ToOnnx(accuracy_level=level, tower_accuracy_level=level)
    write_graphs(checkpoint, (target,), path, "", RunContext(threads=1))
    return Bundle.open(path)


def noise(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    return Image.fromarray(values)


def int8_cache(checkpoint: Checkpoint) -> Checkpoint:
    decoder = checkpoint.spec.decoder
    scales = torch.full((decoder.depth, decoder.kv_heads, decoder.head_dim), 0.02)
    return replace(checkpoint, cache_grid=KVCacheScales(keys=scales, values=scales))


CASES = [
    *((replace, name) for name in SCHEDULES),
    (lambda c: quantize_checkpoint(c, 4), "before"),
    *((int8_cache, name) for name in ("ended", "before", "renumbered")),
]


@pytest.mark.parametrize(("change", "kind"), CASES)
def test_two_turns_with_a_picture_each_equal_torch(
    deep_checkpoint: Checkpoint,
    tmp_path: Path,
    change: Callable[[Checkpoint], Checkpoint],
    kind: str,
) -> None:
    """The second turn's picture comes after cached rows; then an answer is taken back."""
    schedule = SCHEDULES[kind]
    checkpoint = replace(change(deep_checkpoint), visual_schedule=schedule)
    bundle = bundle_of(checkpoint, tmp_path)
    assert bundle.manifest.kv_cache.visual_schedule == schedule
    engine = OnnxRunner(bundle, threads=1, capacity=200)
    sides = [
        Conversation(bundle, runner=engine),
        Conversation(bundle, runner=TorchRunner(checkpoint)),
    ]
    whole = Conversation(bundle, runner=TorchRunner(replace(checkpoint, visual_schedule=None)))
    differs = False
    for turn in range(2):
        asked = [f"what is it {turn}?", noise(turn)]
        found, expected = (side.ask(*asked, max_new_tokens=8).token_ids for side in sides)
        assert found == expected
        differs |= whole.ask(*asked, max_new_tokens=8).token_ids != expected
    assert differs, "the picture is read in full where it should end early"
    runners = [engine, sides[1]._runner]
    visual = checkpoint.spec.visual_tokens
    for runner in runners:
        kept = [2 * schedule.kept(stage, visual) for stage in range(1, len(schedule.drops) + 1)]
        assert runner.stage_lengths.tolist() == [runner.length - 2 * visual + k for k in kept]
        runner.truncate(runner.length - 3)
    row = engine.embed([7]).copy()
    at = np.array([[runners[0].length]])
    found, expected = (runner.decode(row, at) for runner in runners)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_logits_of_calls_that_mix_rows_equal_torch(
    deep_checkpoint: Checkpoint, tmp_path: Path, kind: str
) -> None:
    schedule = SCHEDULES[kind]
    checkpoint = replace(deep_checkpoint, visual_schedule=schedule)
    engine = OnnxRunner(bundle_of(checkpoint, tmp_path), threads=1, capacity=64)
    reference = TorchRunner(checkpoint)
    _, _, prompt = make_prompt(checkpoint)
    flags = prompt.is_visual[0].numpy()
    rows = len(flags)
    for edges in ((0, rows), (0, 2, rows), (0, 1, rows - 2, rows - 1, rows)):
        engine.reset()
        reference.reset()
        for start, end in pairwise(edges):
            call = (
                prompt.embeds[:, start:end].numpy(),
                prompt.positions[:, start:end].numpy(),
                flags[start:end],
            )
            found, expected = engine.decode(*call), reference.decode(*call)
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    decoder, visual = checkpoint.spec.decoder, int(flags.sum())
    held = [rows - visual + kept for kept in schedule.rows_by_layer(decoder.depth, visual)]
    for layer in range(decoder.depth):
        written = np.abs(engine._cache[f"{layer}.key"]).sum(axis=(0, 1, 3)) > 0
        assert written.sum() == held[layer]
    row_bytes = 2 * 4 * decoder.kv_heads * decoder.head_dim
    assert engine.held_bytes == row_bytes * sum(held)
    with pytest.raises(InputError, match="the last row of a call is visual"):
        engine.decode(call[0], call[1], np.ones(1, np.bool_))
    assert engine.length == rows


@pytest.mark.parametrize("kind", ["ended", "before", "renumbered"])
def test_the_certificate_passes_and_catches_a_graph_that_drops_elsewhere(
    deep_checkpoint: Checkpoint, tmp_path: Path, kind: str
) -> None:
    from pocketvlm.calibration.source import CalibrationSet

    checkpoint = replace(deep_checkpoint, visual_schedule=SCHEDULES[kind])
    bundle = bundle_of(checkpoint, tmp_path)
    samples = list(CalibrationSet.from_reference(1, 3, split="evaluation"))
    assert certify(checkpoint, bundle, samples, tokens=4).passed
    other = certify(
        replace(checkpoint, visual_schedule=VisualSchedule.ending(1)), bundle, samples, tokens=4
    )
    names = {
        check.metric for target in other.targets for check in target.checks if not check.passed
    }
    assert "prefill.sqnr_db" in names


def test_graphs_of_whole_decoders_have_no_such_input(
    deep_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    inputs = {}
    for name, checkpoint in (
        ("whole", deep_checkpoint),
        ("late", replace(deep_checkpoint, visual_schedule=VisualSchedule.ending(LATE))),
    ):
        ToOnnx().export(checkpoint, tmp_path / name, RunContext(threads=1))
        graph = onnx.load(tmp_path / name / "onnx" / "decoder.onnx", load_external_data=False).graph
        inputs[name] = {value.name for value in graph.input}
    assert inputs["late"] - inputs["whole"] == {"text_rows", "past_stage_lengths"}


def test_accuracy_levels_agree_where_visual_rows_end_early(deep_paths: dict[str, Path]) -> None:
    checkpoint = quantize_checkpoint(Checkpoint.load(deep_paths["llava"]), 4)
    checkpoint = replace(checkpoint, visual_schedule=VisualSchedule.ending(LATE))
    prompts = [make_prompt(checkpoint)[2]]
    agreement = agreement_of_levels(checkpoint, prompts, RunContext(threads=1))
    assert agreement.positions == int((~prompts[0].is_visual).sum())
    assert 0 < agreement.relative_error < 0.1


@pytest.mark.parametrize("target", [ToExecutorch(), ToCoreml()])
def test_other_targets_refuse(
    deep_paths: dict[str, Path], tmp_path: Path, target: ToExecutorch | ToCoreml
) -> None:
    checkpoint = replace(
        Checkpoint.load(deep_paths["llava"]), visual_schedule=VisualSchedule.ending(LATE)
    )
    with pytest.raises(UnsupportedError, match=rf"^{target.method}: .* leave drop_tokens out"):
        target.export(checkpoint, tmp_path, RunContext(threads=1))


@pytest.mark.parametrize("kind", ["ended", "before", "renumbered"])
def test_a_question_taken_back_leaves_no_trace(
    deep_paths: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """What it had ranked would otherwise answer the next one about the same picture."""
    checkpoint = replace(Checkpoint.load(deep_paths["llava"]), visual_schedule=SCHEDULES[kind])
    engine = OnnxRunner(bundle_of(checkpoint, tmp_path), threads=1, capacity=200)
    fresh = TorchRunner(checkpoint)
    flags = np.repeat([False, True, False], [2, 16, 4])
    rows = np.random.default_rng(0).standard_normal((2, len(flags), 64)).astype(np.float32)
    rows[1, :18] = rows[0, :18]
    at = np.arange(len(flags))[None]
    engine.decode(rows[:1], at, flags)
    reused = engine.truncate(18)
    assert reused == (18 if kind == "ended" else 2)
    found = engine.decode(rows[1:, reused:], at[:, reused:], flags[reused:])
    expected = fresh.decode(rows[1:], at, flags)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    assert engine.stage_lengths.tolist() == fresh.stage_lengths.tolist()


@pytest.mark.parametrize("ranked_in", ["layer_before", "layer_after"])
def test_positions_on_three_axes_follow_the_rows(tmp_path: Path, ranked_in: str) -> None:
    write_random_model(tiny_config("qwen2.5-vl"), tmp_path / "model")
    checkpoint = Checkpoint.load(tmp_path / "model")
    tokens = checkpoint.spec.visual_tokens
    drop = VisualDrop(layers=1, keep=tokens // 2)
    schedule = VisualSchedule(drops=(drop,), tokens=tokens, ranked_in=ranked_in)
    checkpoint = replace(checkpoint, visual_schedule=schedule)
    (tmp_path / "bundle").mkdir()
    engine = OnnxRunner(bundle_of(checkpoint, tmp_path / "bundle"), threads=1, capacity=64)
    grid, text = checkpoint.spec.position_grid, np.tile(np.arange(3), (3, 1))
    places = [text, 3 + grid.offsets(np.arange(tokens)), 3 + grid.advance + text]
    flags = np.repeat([False, True, False], [3, tokens, 3])
    width = checkpoint.spec.decoder.hidden_size
    embeds = np.random.default_rng(0).standard_normal((1, tokens + 6, width), np.float32)
    call = (embeds, np.concatenate(places, axis=1), flags)
    found, expected = (run.decode(*call) for run in (engine, TorchRunner(checkpoint)))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
