"""Weights lie in files and not in memory, and nobody can tell from what is computed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint, tensors
from pocketvlm.compress.quantization.affine.gptq import Gptq
from pocketvlm.compress.quantization.affine.rules import WeightRule
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckpointError
from tests.contracts.promises import read

needs_maps = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")

WIDE = torch.arange(3 * 4096, dtype=torch.float32).reshape(3, 4096)


def file_of(tensor: torch.Tensor) -> str | None:
    """The file that a tensor's memory is a mapping of."""
    place = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *file = line.split(maxsplit=5)
        begin, end = (int(edge, 16) for edge in span.split("-"))
        if begin <= place < end:
            return file[0] if file else None
    return None


def large_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        f"{linear.name}.{key}": tensor
        for linear, form in checkpoint.forms().items()
        for key, tensor in form.to_tensors().items()
        if tensor.nbytes >= 4096
    }


def read_one(file: Path, key: str = "x") -> torch.Tensor:
    return tensors.read_tensor(tensors.read_headers([file], {})[key])


@needs_maps
def test_weights_of_a_model_lie_in_its_files(tiny_path):
    found = large_tensors(Checkpoint.load(tiny_path))
    assert found
    assert {file_of(tensor) for tensor in found.values()} == {str(tiny_path / "model.safetensors")}


@needs_maps
def test_finished_layers_lie_in_files_too(tiny_path, tmp_path):
    stage = Gptq(rules=(WeightRule(bits=8, group_size=32),))
    samples = CalibrationSet.from_reference(0, 3)
    done = stage.apply(Checkpoint.load(tiny_path), samples, RunContext(scratch_dir=tmp_path))
    codes = large_tensors(done)
    assert codes
    assert {Path(file_of(tensor)).parent for tensor in codes.values()} == {tmp_path}


@needs_maps
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {"rules": [{"bits": 4, "group_size": 16}], "grid_points": 3}),
        ("rotate", {"untie_head": True}),
        ("prune_width", {"ffn_ratio": 0.5, "tower_ffn_ratio": 0.5}),
    ],
)
def test_new_weights_of_a_whole_model_lie_in_files_without_names(
    tiny_paths, tmp_path, method, options
):
    path, samples = tiny_paths["smolvlm"], CalibrationSet.from_reference(0, 3)
    stage = read("stages", method, options)
    known = stage.apply(Checkpoint.load(path), samples, RunContext())
    done = stage.apply(Checkpoint.load(path), samples, RunContext(scratch_dir=tmp_path))
    places = [file_of(tensor) for tensor in large_tensors(done).values()]
    new = [place for place in places if place != str(path / "model.safetensors")]
    assert new
    assert all(place and place.startswith(f"{tmp_path}/") for place in new)
    assert all(place.endswith(" (deleted)") for place in new)
    for linear, form in known.forms().items():
        assert torch.equal(done.form(linear.name).dequantize(), form.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_in_a_file_is_the_same_tensor(tmp_path, dtype):
    turned = WIDE.to(dtype).T
    kept = tensors.keep_in_file(turned, tmp_path)
    assert torch.equal(kept, turned)
    assert kept.dtype == dtype
    assert not list(tmp_path.iterdir())
    assert tensors.keep_in_file(turned, None) is turned


def test_what_is_mapped_and_what_is_copied_ends_in_the_same_bytes(tiny_path, tmp_path, monkeypatch):
    """A run that reads everything into memory is what mapping is held to."""
    stage = Gptq(rules=(WeightRule(bits=4, group_size=16),), drift_share=0.5)
    samples = CalibrationSet.from_reference(0, 4)

    def weights(folder: Path | None, name: str) -> bytes:
        done = stage.apply(Checkpoint.load(tiny_path), samples, RunContext(scratch_dir=folder))
        done.save(tmp_path / name)
        return (tmp_path / name / "model.safetensors").read_bytes()

    mapped = weights(tmp_path / "layers", "mapped")
    monkeypatch.setattr(tensors, "_PAGE", sys.maxsize)
    assert weights(None, "copied") == mapped


def test_what_is_written_to_a_tensor_stays_in_the_process(tmp_path):
    save_file({"x": WIDE}, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    read_one(tmp_path / "a.safetensors").zero_()
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert torch.equal(read_one(tmp_path / "a.safetensors"), WIDE)


def test_a_tensor_stays_when_its_file_is_replaced(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"x": WIDE}, file)
    kept = read_one(file)
    save_file({"x": WIDE * 0}, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").replace(file)
    assert torch.equal(kept, WIDE)


@pytest.mark.parametrize("dtype", [*tensors._TORCH_TYPES.values()])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4096)])
def test_every_type_and_shape_is_read_as_safetensors_reads_it(tmp_path, dtype, shape):
    values = {
        "x": torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype),
        "y": torch.ones(7, dtype=torch.uint8),
    }
    save_file(values, tmp_path / "a.safetensors")
    expected = load_file(tmp_path / "a.safetensors")["x"]
    found = read_one(tmp_path / "a.safetensors")
    assert found.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert torch.equal(found.to(torch.float64), expected.to(torch.float64))


def test_values_at_odd_places_are_read(tmp_path):
    """Other writers put tensors where no type of more than a byte may begin."""
    body = b"\x01" + WIDE.numpy().tobytes()
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": list(WIDE.shape), "data_offsets": [1, len(body)]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    assert torch.equal(read_one(tmp_path / "a.safetensors"), WIDE)


@pytest.mark.parametrize("place", [0, 4096, -1])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(tmp_path, place, monkeypatch):
    monkeypatch.setattr(tensors, "_CHUNK_ELEMENTS", 1000)
    values = WIDE.clone()
    values.view(-1)[place] = torch.inf
    save_file({"x": values}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="tensor x holds values that are not finite"):
        read_one(tmp_path / "a.safetensors")


def test_tensors_are_compared_to_the_last_element(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_CHUNK_ELEMENTS", 1000)
    other = WIDE.clone()
    other.view(-1)[-1] += 1
    save_file({"x": WIDE, "same": WIDE.clone(), "other": other}, tmp_path / "a.safetensors")
    found = tensors.read_headers([tmp_path / "a.safetensors"], {})
    assert tensors.tensors_equal(found["x"], found["same"])
    assert not tensors.tensors_equal(found["x"], found["other"])


def test_a_model_may_be_removed_after_it_was_loaded(tiny_path, tmp_path):
    path = shutil.copytree(tiny_path, tmp_path / "model")
    checkpoint = Checkpoint.load(path)
    shutil.rmtree(path)
    original = Checkpoint.load(tiny_path)
    for linear, form in checkpoint.forms().items():
        assert torch.equal(form.dequantize(), original.form(linear.name).dequantize())
