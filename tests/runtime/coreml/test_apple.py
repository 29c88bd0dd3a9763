"""What of Core ML's side can be tested without it: calls that exist, types that are kept.

coremltools is real; only what it would ask of the operating system is replaced.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pocketvlm.errors import UnsupportedError
from pocketvlm.runtime.coreml.apple import COMPUTE_UNITS, AppleToolkit, DevicePackage
from tests.emulation.mil.rig import toolkit, write_package


@pytest.fixture
def package(tmp_path: Path) -> Path:
    kit = toolkit()
    inputs = {"x": kit.mb.TensorSpec((1, 4), dtype=kit.types.fp16)}
    build = (inputs, lambda mb, x: mb.relu(x=x, name="y"))
    return write_package(tmp_path / "model.mlpackage", {"decode": build, "prefill": build})


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> AppleToolkit:
    kit = toolkit().ct
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    compiled: list[str] = []

    def compile_model(path: str) -> str:
        compiled.append(path)
        return path + "c"

    monkeypatch.setattr(kit.models.utils, "compile_model", compile_model)
    made = AppleToolkit("CPU_AND_NE")
    made.compiled = compiled
    return made


def imported(module: str) -> Any:
    toolkit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return __import__(module, fromlist=["all"])


def accepts(function: Any, *names: str) -> bool:
    return set(names) <= inspect.signature(function).parameters.keys()


def test_it_calls_what_coremltools_has() -> None:
    ct = toolkit().ct
    assert {unit.name for unit in ct.ComputeUnit} == set(COMPUTE_UNITS)
    assert accepts(ct.models.CompiledMLModel.__init__, "path", "compute_units", "function_name")
    assert accepts(ct.models.CompiledMLModel.predict, "data", "state")
    assert callable(ct.models.CompiledMLModel.make_state)
    assert accepts(ct.models.utils.compile_model, "model")
    assert accepts(ct.models.MLModel.__init__, "model", "compute_units", "function_name")
    perf = imported("coremltools.models.ml_program.experimental.perf_utils")
    assert accepts(perf.MLModelBenchmarker.__init__, "model")
    assert accepts(perf.MLModelBenchmarker.benchmark_load, "iterations")
    predict = perf.MLModelBenchmarker.benchmark_predict
    assert accepts(predict, "inputs", "iterations", "warmup")
    assert accepts(perf.MLModelBenchmarker.Measurement, "samples")
    plan = imported("coremltools.models.compute_plan")
    assert accepts(plan.MLComputePlan.load_from_path, "path", "compute_units")
    for name in (
        "get_compute_device_usage_for_mlprogram_operation",
        "get_estimated_cost_for_mlprogram_operation",
    ):
        assert accepts(getattr(plan.MLComputePlan, name), "operation")
    assert accepts(plan.MLComputePlanDeviceUsage, "preferred_compute_device")
    assert accepts(plan.MLModelStructureProgramOperation, "operator_name")
    devices = imported("coremltools.models.compute_device")
    assert hasattr(devices, "MLNeuralEngineComputeDevice")


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is there")
def test_other_machines_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="inspect BUNDLE --evaluate"):
        AppleToolkit("ALL")


def test_a_package_is_compiled_once(
    apple: AppleToolkit, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ct = toolkit().ct
    monkeypatch.setattr(ct.models, "CompiledMLModel", lambda path, **options: (path, options))
    loaded = [apple.load(package, name) for name in ("prefill", "decode", None)]
    assert [options["function_name"] for _, options in loaded] == ["prefill", "decode", None]
    assert {path for path, _ in loaded} == {f"{package}c"}
    assert all(o["compute_units"] is ct.ComputeUnit.CPU_AND_NE for _, o in loaded)
    assert apple.compiled == [str(package)]
    assert "CPU_AND_NE" in apple.engine


def test_the_plan_names_the_device_of_every_operator(
    apple: AppleToolkit, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = imported("coremltools.models.compute_device")
    kinds = {
        "linear": devices.MLNeuralEngineComputeDevice,
        "softmax": devices.MLGPUComputeDevice,
        "gather": devices.MLCPUComputeDevice,
    }

    def usage(operation: Any) -> Any:
        kind = kinds.get(operation.operator_name)
        if kind is None:
            return None
        return SimpleNamespace(preferred_compute_device=object.__new__(kind))

    operations = [SimpleNamespace(operator_name=name) for name in ("const", *kinds)]
    entry = SimpleNamespace(block=SimpleNamespace(operations=operations))
    found = SimpleNamespace(
        model_structure=SimpleNamespace(
            program=SimpleNamespace(functions={"decode": entry, "prefill": None})
        ),
        get_compute_device_usage_for_mlprogram_operation=usage,
        get_estimated_cost_for_mlprogram_operation=lambda operation: (
            None if operation.operator_name == "gather" else SimpleNamespace(weight=0.5)
        ),
    )
    plan = imported("coremltools.models.compute_plan")
    monkeypatch.setattr(plan.MLComputePlan, "load_from_path", lambda **_: found)
    expected = [
        {"operator": "linear", "device": "neural_engine", "cost": 0.5},
        {"operator": "softmax", "device": "gpu", "cost": 0.5},
        {"operator": "gather", "device": "cpu", "cost": None},
    ]
    assert apple.plan(package, "decode") == expected
    assert apple.plan(package, None) == expected


def test_the_benchmark_keeps_raw_samples(
    apple: AppleToolkit, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perf = imported("coremltools.models.ml_program.experimental.perf_utils")
    monkeypatch.setattr(toolkit().ct.models, "MLModel", lambda _, **options: options)
    asked = []

    class Benchmarker:
        def __init__(self, model: Any) -> None:
            asked.append(model["function_name"])

        async def benchmark_load(self, iterations: int) -> Any:
            return SimpleNamespace(samples=[7.0] * iterations)

        async def benchmark_predict(self, inputs: Any, iterations: int, warmup: bool) -> Any:
            asked.append((sorted(inputs), warmup))
            return SimpleNamespace(samples=[1.5] * iterations)

    monkeypatch.setattr(perf, "MLModelBenchmarker", Benchmarker)
    found = apple.benchmark(package, "decode", {"embeds": np.zeros(1)}, 3)
    assert found == {"load_ms": [7.0], "predict_ms": [1.5, 1.5, 1.5]}
    assert asked == ["decode", (["embeds"], True)]


def test_functions_of_a_package_share_one_state(tmp_path: Path) -> None:
    kit = toolkit()
    mb = kit.mb

    def function(rows: int) -> Any:
        inputs = {
            "x": mb.TensorSpec((rows, 4), dtype=kit.types.fp16),
            "past": mb.TensorSpec((1,), dtype=kit.types.int32),
            "cache": mb.StateTensorSpec((8, 4), dtype=kit.types.fp16),
        }
        return inputs, lambda mb, cache, **_: mb.reduce_sum(
            x=mb.read_state(input=cache), keep_dims=False, name="total"
        )

    path = write_package(tmp_path / "two.mlpackage", {"many": function(4), "one": function(1)})
    calls: list[Any] = []

    class Model:
        def __init__(self, name: str | None) -> None:
            calls.append(("load", name))

        def make_state(self) -> Any:
            calls.append(("state",))
            return object()

        def predict(self, data: Any, state: Any = None) -> Any:
            calls.append(({name: value.dtype.name for name, value in data.items()}, state))
            return {"total": np.zeros(1)}

    package = DevicePackage(path, SimpleNamespace(engine="x", load=lambda _path, name: Model(name)))
    for name, rows in (("many", 4), ("one", 1), ("one", 1)):
        package.predict(name, {"x": np.zeros((rows, 4), np.float32), "past": np.zeros(1)})
    assert [call for call in calls if call[0] == "load"] == [("load", "many"), ("load", "one")]
    assert calls.count(("state",)) == 1
    predictions = [call for call in calls if isinstance(call[0], dict)]
    assert len({id(state) for _, state in predictions}) == 1
    assert all(data == {"x": "float16", "past": "int32"} for data, _ in predictions)
    package.clear_states()
    package.predict("one", {"x": np.zeros((1, 4)), "past": np.zeros(1)})
    assert calls.count(("state",)) == 2
