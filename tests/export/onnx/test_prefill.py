"""The graph for long calls: its weights, what it computes, and who may have it."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from pocketvlm.bundle import Bundle, TensorSignature, VisualSchedule
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import BundleError, StorageError, UnsupportedError
from pocketvlm.export.onnx.target import ToOnnx
from pocketvlm.pipeline.assemble import write_graphs
from pocketvlm.reference.random_models import write_tiny_model
from pocketvlm.reference_graph.activation_rounding import round_per_block, simulate_activations
from pocketvlm.reference_graph.forward import decode_logits, new_cache
from pocketvlm.runtime.engines import spilling_engines
from pocketvlm.runtime.onnx.made_weights import make_weights
from pocketvlm.runtime.onnx.runner import OnnxRunner
from pocketvlm.stages import PlanState
from pocketvlm.weights.affine import AffineWeight
from pocketvlm.weights.dense import DenseWeight
from pocketvlm.weights.kv_cache import KVCacheScales
from tests.export.rig import make_prompt, quantize_affine, quantize_checkpoint

Made = Mapping[str, np.ndarray]
LEAST = 6
LONG = ToOnnx(int8_prefill_rows=LEAST)


def write_bundle(checkpoint: Checkpoint, path: Path, target: ToOnnx = LONG) -> Bundle:
    path.mkdir()
    write_graphs(checkpoint, (target,), path, "", RunContext(threads=1))
    return Bundle.open(path)


def tiny(family: str, path: Path) -> Checkpoint:
    write_tiny_model(family, path)
    return Checkpoint.load(path)


def require_nearest_codes(codes: np.ndarray, scales: np.ndarray, weight: np.ndarray) -> None:
    """Codes [columns, rows] of a matrix, one scale per row, held to float64 row by row."""
    for code, scale, row in zip(codes.T.astype(np.float64) - 128, scales, weight, strict=True):
        step = max(abs(x) for x in row) / 127
        assert scale == pytest.approx(step, rel=1e-6)
        # Codes of few levels have many ties, which may fall either way in float32.
        assert np.abs(code - row / step).max() < 0.5 + 1e-4
        assert np.abs(code).max() == 127


def products(checkpoint: Checkpoint) -> Iterator[tuple[str, ...]]:
    """Layers of the decoder by what is one product, up to the last block's attention."""
    *before, last = checkpoint.spec.decoder.blocks
    for block in before:
        yield from (block.mixer.inputs, (block.mixer.output,), block.ffn.inputs, (block.ffn.down,))
    yield last.mixer.inputs


def rows_of(made: Made, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a product."""
    own = {key: values for key, values in made.items() if key.startswith(f"rows.{names[0]}")}
    (codes,) = (values for key, values in own.items() if key.endswith(".codes"))
    (scales,) = (values for key, values in own.items() if key.endswith(".scales"))
    return codes, scales


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(4, 32, False), (4, 16, True), (3, 64, False), (2, 32, False), (8, 32, True)],
)
def test_rows_are_made_of_the_codes_of_the_decoder(
    tiny_paths: dict[str, Path], tmp_path: Path, bits: int, group: int, symmetric: bool
) -> None:
    checkpoint = Checkpoint.load(tiny_paths["llava"])
    quantize_checkpoint(checkpoint, bits, group, symmetric=symmetric)
    bundle = write_bundle(checkpoint, tmp_path / "bundle")
    made = make_weights(bundle, 1)
    for names in products(checkpoint):
        dense = [checkpoint.form(name).dequantize().double().numpy() for name in names]
        require_nearest_codes(*rows_of(made, names), np.concatenate(dense))
    assert 2 * len(list(products(checkpoint))) == len(made)
    state = PlanState.of_checkpoint(checkpoint)
    held = sum(values.nbytes for values in made.values())
    assert held == LONG.prefill_bytes(state.spec, state.layouts)


def test_weights_that_would_saturate_are_refused(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = quantize_checkpoint(Checkpoint.load(tiny_paths["llava"]), 4)
    bundle = write_bundle(checkpoint, tmp_path / "bundle")
    components = tuple(
        replace(each, outputs=tuple(_as_signed(one) for one in each.outputs))
        if each.role == "unpack"
        else each
        for each in bundle.manifest.components
    )
    older = replace(bundle, manifest=replace(bundle.manifest, components=components))
    with pytest.raises(BundleError, match=r"codes as int8 of .* types uint8, float32"):
        make_weights(older, 1)


def _as_signed(output: TensorSignature) -> TensorSignature:
    return replace(output, dtype="int8") if output.dtype == "uint8" else output


def test_what_is_made_may_lie_in_a_file(
    tiny_paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = quantize_checkpoint(Checkpoint.load(tiny_paths["llava"]), 4)
    bundle = write_bundle(checkpoint, tmp_path / "bundle")
    spilled, held = tmp_path / "spilled", OnnxRunner(bundle, threads=1, capacity=32)
    spilled.mkdir()
    engine = spilling_engines(spilled)["onnx"](bundle, 1, 0)
    assert isinstance(engine, OnnxRunner)
    ids = list(range(3, 3 + LEAST))
    logits = [
        each.decode(each.embed(ids), np.arange(LEAST)[None]).copy() for each in (engine, held)
    ]
    np.testing.assert_array_equal(*logits)
    assert not any(spilled.iterdir())
    for runner, is_mapped in ((engine, True), (held, False)):
        assert {_base(values) is mmap.mmap for values in runner._made.values()} == {is_mapped}

    def fill(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pocketvlm.runtime.onnx.made_weights.tempfile.TemporaryFile", fill)
    with pytest.raises(StorageError, match="spilled: No space left on device"):
        spilling_engines(spilled)["onnx"](bundle, 1, 0)


def _base(values: np.ndarray) -> type[object]:
    """The type of what owns the memory of an array."""
    owner: object = values
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    return type(owner)


def whole_cache(checkpoint: Checkpoint) -> Checkpoint:
    """With an int8 cache whose channels all span the same."""
    decoder = checkpoint.spec.decoder
    ranges = torch.full((len(decoder.attention_blocks), decoder.kv_heads, decoder.head_dim), 2.0)
    return replace(checkpoint, cache_grid=KVCacheScales.from_ranges(ranges, ranges))


def multiply_rows(checkpoint: Checkpoint, made: Made) -> None:
    """Has torch multiply what a bundle makes, every token rounded by itself."""
    for names in products(checkpoint):
        codes, scales = rows_of(made, names)
        dense = torch.from_numpy((codes.T.astype(np.float32) - 128) * scales[:, None])
        rows = [checkpoint.form(name).shape[0] for name in names]
        for name, own in zip(names, dense.split(rows), strict=True):
            checkpoint.set_form(name, DenseWeight(values=own.clone()))
            checkpoint.layer(name).register_forward_pre_hook(
                lambda _, inputs: (round_per_block(inputs[0], inputs[0].shape[-1]),)
            )


@pytest.mark.parametrize(
    ("family", "is_int8"),
    [("lfm2-vl", False), ("smolvlm", False), ("smolvlm", True)],
)
def test_the_cache_holds_what_torch_says(
    family: str, is_int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pieces read what earlier ones have written.
    monkeypatch.setattr("pocketvlm.runtime.onnx.runner.PREFILL_PIECE_ROWS", 7)
    checkpoint = quantize_checkpoint(tiny(family, tmp_path / "model"), 4, 16)
    if is_int8:
        checkpoint = whole_cache(checkpoint)
    bundle = write_bundle(checkpoint, tmp_path / "bundle")
    runner = OnnxRunner(bundle, threads=1, capacity=64)
    _, _, prompt = make_prompt(checkpoint)
    last = prompt.embeds.shape[1] - 1  # which the decoder runs
    logits = runner.decode(prompt.wide.numpy(), prompt.positions_of(0).numpy())
    with torch.inference_mode():
        groups, plain = new_cache(checkpoint), checkpoint.cache_grid
        expected = decode_logits(checkpoint, prompt, groups, last_only=True)[0, 0].numpy()
        multiply_rows(checkpoint, make_weights(bundle, 1))
        rows = new_cache(checkpoint)
        decode_logits(checkpoint, prompt, rows, last_only=True)
    assert 1e-4 < np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.1
    for number, block in enumerate(checkpoint.spec.decoder.attention_blocks):
        for side, kind in enumerate(("key", "value")):
            found = runner._cache[f"{block}.{kind}"][0, :, :last].astype(np.float32)
            if plain is not None:
                found *= (plain.values if side else plain.keys)[number].numpy()[:, None, :]
            torches, others = (
                cache.rows(block)[side][0, :, :last].numpy() for cache in (rows, groups)
            )
            # A number on the border between two codes may take either, and changes what follows.
            error = np.linalg.norm(found - torches) / np.linalg.norm(torches)
            assert error < (0.005 if is_int8 else 0.003)
            assert error < 0.4 * np.linalg.norm(found - others) / np.linalg.norm(torches)


@pytest.mark.parametrize("family", ["lfm2-vl", "smolvlm"])
def test_a_simulation_follows_long_calls(family: str, tmp_path: Path) -> None:
    checkpoint = quantize_checkpoint(tiny(family, tmp_path / "model"), 4, 16)
    runner = OnnxRunner(write_bundle(checkpoint, tmp_path / "bundle"), threads=1, capacity=64)
    _, _, prompt = make_prompt(checkpoint)
    last = prompt.embeds.shape[1] - 1
    logits = runner.decode(prompt.wide.numpy(), prompt.positions_of(0).numpy())

    def simulate(least: int | None) -> tuple[np.ndarray, np.ndarray]:
        cache = new_cache(checkpoint)
        with (
            torch.inference_mode(),
            simulate_activations(checkpoint, "onnx", int8_prefill_rows=least),
        ):
            found = decode_logits(checkpoint, prompt, cache, last_only=True)[0, 0].numpy()
        blocks = checkpoint.spec.decoder.attention_blocks
        return found, cache.rows(blocks[-1])[0][0, :, :last].numpy()

    def error(found: np.ndarray, other: np.ndarray) -> float:
        return float(np.linalg.norm(found - other) / np.linalg.norm(other))

    (long, rows), (short, others) = simulate(LEAST), simulate(None)
    blocks = checkpoint.spec.decoder.attention_blocks
    held = runner._cache[f"{blocks[-1]}.key"][0, :, :last]
    assert error(held, rows) < 0.001
    assert error(held, rows) < 0.1 * error(held, others)
    assert error(logits, long) < 0.1 * error(logits, short)
    # A call of fewer rows is the decoder's.
    np.testing.assert_array_equal(simulate(last + 2)[0], short)
    np.testing.assert_array_equal(simulate(last + 1)[0], long)


def test_other_arithmetics_have_no_long_calls(tiny_paths: dict[str, Path]) -> None:
    checkpoint = Checkpoint.load(tiny_paths["smolvlm"])
    with (
        pytest.raises(ValueError, match="int8_prefill_rows is the ONNX target's"),
        simulate_activations(checkpoint, "executorch", int8_prefill_rows=LEAST),
    ):
        pass


def test_short_calls_and_generated_tokens_are_the_decoders(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = quantize_checkpoint(Checkpoint.load(tiny_paths["llava"]), 4)
    plain = OnnxRunner(
        write_bundle(checkpoint, tmp_path / "plain", ToOnnx()), threads=1, capacity=32
    )
    long = OnnxRunner(write_bundle(checkpoint, tmp_path / "long"), threads=1, capacity=32)

    def feed(engine: OnnxRunner, count: int) -> np.ndarray:
        start = engine.length
        ids = list(range(3, 3 + count))
        return engine.decode(engine.embed(ids), np.arange(start, start + count)[None]).copy()

    for count in (LEAST - 1, 1, 1, LEAST - 1):
        np.testing.assert_array_equal(feed(long, count), feed(plain, count))
    assert not np.array_equal(feed(long, LEAST), feed(plain, LEAST))
    # What was run can be forgotten as usual.
    before = long.length
    first = feed(long, LEAST)
    long.truncate(before)
    np.testing.assert_array_equal(feed(long, LEAST), first)


def test_a_last_row_that_others_see_is_not_left_to_another_call(tmp_path: Path) -> None:
    checkpoint = quantize_checkpoint(tiny("gemma3", tmp_path / "model"), 4)
    long = OnnxRunner(write_bundle(checkpoint, tmp_path / "long"), threads=1, capacity=32)
    plain = OnnxRunner(
        write_bundle(checkpoint, tmp_path / "plain", ToOnnx()), threads=1, capacity=32
    )
    rows = LEAST + 2
    for last, equal in ((0, True), (-1, False)):
        mutual = np.array([-1, -1, *[0] * (rows - 3), last])
        found = []
        for engine in (long, plain):
            engine.reset()
            embeds = engine.embed(list(range(3, 3 + rows)))
            found.append(engine.decode(embeds, np.arange(rows)[None], mutual=mutual).copy())
        assert np.array_equal(*found) == equal


def test_codes_are_stored_once(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = quantize_checkpoint(Checkpoint.load(tiny_paths["smolvlm"]), 4)
    folders = [
        write_bundle(checkpoint, tmp_path / name, target).path / "onnx"
        for name, target in (("plain", ToOnnx()), ("long", LONG))
    ]
    sizes = [(folder / "weights.bin").stat().st_size for folder in folders]
    assert 0 <= sizes[1] - sizes[0] < 8192
    decoder, unpack = (
        {
            tuple(entry.value for entry in tensor.external_data)
            for tensor in onnx.load(folders[1] / file, load_external_data=False).graph.initializer
            if tensor.name.endswith(".codes") and tensor.external_data
        }
        for file in ("decoder.onnx", "unpack.onnx")
    )
    assert unpack
    assert unpack < decoder  # which has the head and the end of the last block too


@pytest.mark.parametrize("rows", [1, 0, -4, 1 << 20])
def test_rows_that_cannot_be_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"int8_prefill_rows is {rows}; allowed are 2 to 65535"):
        ToOnnx(int8_prefill_rows=rows)


def test_nothing_is_rounded_where_that_was_asked_for() -> None:
    with pytest.raises(ValueError, match="accuracy_level 0 says that nothing is rounded"):
        ToOnnx(int8_prefill_rows=32, accuracy_level=0)


def test_models_that_cannot_have_it_are_refused(
    tiny_paths: dict[str, Path], tmp_path: Path, ctx: RunContext
) -> None:
    floats = Checkpoint.load(tiny_paths["smolvlm"])
    codes = quantize_checkpoint(Checkpoint.load(tiny_paths["smolvlm"]), 4)
    ended = replace(codes, visual_schedule=VisualSchedule.ending(1))
    for number, (checkpoint, reason) in enumerate(
        [
            (floats, "no layer of the decoder has integers in groups"),
            (ended, "drop_tokens ranks visual rows by it; leave one of them out"),
        ]
    ):
        (refusal,) = LONG.refuse(PlanState.of_checkpoint(checkpoint))
        assert refusal.startswith("onnx: int8_prefill_rows ")
        assert reason in refusal
        assert ToOnnx().refuse(PlanState.of_checkpoint(checkpoint)) == ()
        with pytest.raises(UnsupportedError, match=reason):
            LONG.export(checkpoint, tmp_path / str(number), ctx)
    assert LONG.refuse(PlanState.of_checkpoint(codes)) == ()


def test_its_price_is_planned_and_reported(
    tiny_paths: dict[str, Path], tmp_path: Path, ctx: RunContext
) -> None:
    checkpoint = quantize_checkpoint(Checkpoint.load(tiny_paths["smolvlm"]), 4)
    state = PlanState.of_checkpoint(checkpoint)
    (warning,) = LONG.predict(state.spec, state.layouts).warnings
    components = {each.role: each for each in LONG.export(checkpoint, tmp_path, ctx)}
    assert list(components) == ["vision", "embedding", "decoder", "prefill", "unpack"]
    assert components["decoder"].notes == (warning.removeprefix("onnx: "),)
    assert f"{LONG.prefill_bytes(state.spec, state.layouts):,} bytes of memory" in warning
    assert components["prefill"].least_rows == LEAST
    assert components["decoder"].least_rows is None
    assert ToOnnx().predict(state.spec, state.layouts).warnings == ()
    assert ToOnnx().prefill_bytes(state.spec, state.layouts) == 0


def test_a_model_whose_rows_all_see_each_other_goes_without(
    tmp_path: Path, ctx: RunContext
) -> None:
    checkpoint = quantize_checkpoint(tiny("paligemma", tmp_path / "model"), 4)
    state = PlanState.of_checkpoint(checkpoint)
    assert LONG.refuse(state) == ()
    (warning,) = LONG.predict(state.spec, state.layouts).warnings
    assert warning.startswith("onnx: int8_prefill_rows changes nothing: the rows of this model's")
    components = LONG.export(checkpoint, tmp_path / "bundle", ctx)
    assert [each.role for each in components] == ["vision", "embedding", "decoder"]
    assert components[2].notes == (warning.removeprefix("onnx: "),)
    assert LONG.prefill_bytes(state.spec, state.layouts) == 0


def test_zero_points_between_codes_are_read_too(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.load(tiny_paths["llava"])
    name = checkpoint.spec.decoder.blocks[0].ffn.down
    grid = quantize_affine(checkpoint.form(name).dequantize(), 4)
    shifted = AffineWeight.from_codes(
        grid.codes(),
        grid.scales,
        grid.zero_points().half() + 0.25,
        bits=4,
        group_size=32,
        in_features=grid.in_features,
    )
    checkpoint.set_form(name, shifted)
    made = make_weights(write_bundle(checkpoint, tmp_path / "bundle"), 1)
    assert len(made) == 2  # all others are floats
    codes, scales = rows_of(made, [name])
    require_nearest_codes(codes, scales, shifted.dequantize().double().numpy())
