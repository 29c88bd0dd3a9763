"""Stages on a device: the same results, nothing of two places, and refusals."""

from __future__ import annotations

import pytest
import torch

from pocketvlm.calibration import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.errors import InputError
from pocketvlm.pipeline.compute_device import resolve_device
from pocketvlm.pipeline.job import Job
from tests.contracts.promises import read
from tests.shadow_device import shadow_device

RULES = [{"bits": 4, "group_size": 16}]
BYTE_ROWS = {"part": "tower", "bits": 8, "group_size": None, "symmetric": True}
DRIFT = {"rules": [BYTE_ROWS, *RULES], "drift_share": 0.5, "modality_weights": "gradient"}
SEARCHED = {"rules": RULES, "grid": "mse", "static_groups": True}
GRADIENTS = {"score": {"kind": "gblm"}, "allocation": {"kind": "ecoflap", "order": "first"}}
TRAINED = {"steps": 3, "batch_size": 2, "check_every": 2, "rank": 4}
CASES = [
    ("gptq", DRIFT, "cuda"),
    ("gptq", DRIFT, "mps"),
    ("gptq", SEARCHED, "mps"),
    ("awq", {"rules": RULES, "grid_points": 3}, "cuda"),
    ("sparsegpt_gptq", {"rules": RULES}, "mps"),
    ("codebook", {"rules": [{"index_bits": 3, "vector_length": 2}], "rounds": 1}, "cuda"),
    ("prune", GRADIENTS, "mps"),
    ("prune", {"score": {"kind": "wanda"}, "allocation": {"kind": "ecoflap"}}, "mps"),
    ("distill", TRAINED, "mps"),
]


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet.from_reference(0, 3)


def apply(method, options, path, samples, device="cpu", folder=None):
    stage = read("stages", method, options)
    ctx = RunContext(device=device, scratch_dir=folder, source_dir=path)
    return stage.apply(Checkpoint.load(path), samples, ctx)


@pytest.mark.parametrize(("method", "options", "device"), CASES)
def test_a_device_finds_what_the_processor_finds(
    tiny_paths, samples, tmp_path, method, options, device
):
    path = tiny_paths["smolvlm"]
    known = apply(method, options, path, samples)
    with shadow_device(device) as computed:
        found = apply(method, options, path, samples, device, tmp_path)
    assert computed.count("linear") > 20
    assert found.device == torch.device("cpu")
    for linear, form in known.forms().items():
        for name, values in form.to_tensors().items():
            other = found.form(linear.name).to_tensors()[name]
            assert type(other) is torch.Tensor
            assert torch.equal(other, values), linear.name
    for name, values in known.vectors().items():
        assert torch.equal(found.vectors()[name], values)
    assert not any("main memory" in note for note in found.history[-1].notes)


def test_a_stage_that_does_not_compute_there_says_so(tiny_paths, samples):
    done = apply("rotate", {"residual": False}, tiny_paths["llava"], samples, "cuda")
    assert done.history[-1].notes[-1] == ("rotate ran in main memory: it does not compute on cuda")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "no CUDA device that torch can use; cpu works everywhere"),
        ("cuda:3", "no CUDA device"),
        ("mps", "no GPU of Apple's"),
        ("gpu", "'gpu' is unknown; allowed are cpu, cuda, cuda:N and mps"),
        ("cuda:x", "is unknown"),
    ],
)
def test_a_device_that_is_not_there_is_refused_first(tmp_path, name, message):
    if name.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(InputError, match=message):
        Job(model="nothing/at-all", device=name).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_processes_of_one_machine_take_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda") == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("cuda") == "cuda:1"
    assert resolve_device("cuda:0") == "cuda:0"
    with pytest.raises(InputError, match="2 CUDA devices, from cuda:0 to cuda:1"):
        resolve_device("cuda:2")
