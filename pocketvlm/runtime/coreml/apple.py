"""Core ML itself, through coremltools on an Apple machine: predictions, timings, placement.

Everything here needs macOS; its callers are tested everywhere, with a stand-in that has the same
methods.
"""

from __future__ import annotations

import asyncio
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pocketvlm.emulation.mil.package import MilPackage
from pocketvlm.emulation.mil.systems import LOWEST_SYSTEMS
from pocketvlm.emulation.mil.types import Array
from pocketvlm.errors import BundleError, MissingExtraError, UnsupportedError
from pocketvlm.runtime.coreml.package import ComputedPackage
from pocketvlm.runtime.versions import is_older

__all__ = [
    "COMPUTE_UNITS",
    "AppleToolkit",
    "DevicePackage",
    "LoadedModel",
    "Toolkit",
    "require_system",
]

COMPUTE_UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")
"""Compute units that Core ML may use, by the names of coremltools."""


class LoadedModel(Protocol):
    """One function, loaded, as coremltools offers it."""

    def predict(self, data: Mapping[str, Array], state: Any = None) -> dict[str, Array]:
        """Outputs by name."""
        ...

    def make_state(self) -> Any:
        """States, all zero."""
        ...


class Toolkit(ABC):
    """The parts of Core ML that a worker uses; tests replace it with a stand-in.

    Attributes:
        engine: What computes, in words.
    """

    engine: str

    @abstractmethod
    def load(self, package: Path, function: str | None) -> LoadedModel:
        """Compiles and loads a function; `None` for the only one."""

    @abstractmethod
    def benchmark(
        self, package: Path, function: str | None, inputs: Mapping[str, Array], iterations: int
    ) -> dict[str, list[float]]:
        """Raw samples of loading and predicting: `load_ms` and `predict_ms`."""

    @abstractmethod
    def plan(self, package: Path, function: str | None) -> list[dict[str, Any]]:
        """Where each operator should run: `operator`, `device` and estimated `cost`."""


class DevicePackage(ComputedPackage):
    """A package that Core ML computes; its functions share one set of states."""

    def __init__(self, path: Path, toolkit: Toolkit) -> None:
        """Reads the description; functions are loaded when they are first used."""
        super().__init__(path)
        self.engine = toolkit.engine
        self._toolkit = toolkit
        self._loaded: dict[str, LoadedModel] = {}
        self._state: Any = None

    def predict(self, function: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Computes a function, inputs in the types that it declares."""
        described = self.described.function(function)
        if described.name not in self._loaded:
            name = described.name if len(self.described.functions) > 1 else None
            self._loaded[described.name] = self._toolkit.load(self.described.path, name)
        model = self._loaded[described.name]
        given = {
            parameter.name: np.ascontiguousarray(
                inputs[parameter.name], parameter.type.element.stored
            )
            for parameter in described.inputs
            if not parameter.is_state
        }
        if not any(parameter.is_state for parameter in described.inputs):
            return dict(model.predict(given))
        if self._state is None:
            self._state = model.make_state()
        return dict(model.predict(given, state=self._state))

    def clear_states(self) -> None:
        """Makes all states zero."""
        self._state = None


class AppleToolkit(Toolkit):
    """coremltools on macOS."""

    def __init__(self, units: str) -> None:
        """Checks the machine.

        Args:
            units: One of `COMPUTE_UNITS`.

        Raises:
            UnsupportedError: This is not an Apple machine.
            MissingExtraError: coremltools is not installed.
        """
        if sys.platform != "darwin":
            raise UnsupportedError(
                "Core ML runs on Apple machines alone; here, `pocketvlm inspect BUNDLE --evaluate` "
                "computes the packages with the reference evaluator"
            )
        try:
            import coremltools
        except ImportError as error:
            raise MissingExtraError(
                "Core ML needs coremltools: pip install 'pocketvlm[coreml]'"
            ) from error
        self._kit: Any = coremltools
        self._units: Any = coremltools.ComputeUnit[units]
        self._compiled: dict[Path, str] = {}
        self.engine = (
            f"Core ML of macOS {platform.mac_ver()[0]} on {platform.machine()}, "
            f"compute units {units}"
        )

    def load(self, package: Path, function: str | None) -> LoadedModel:
        """Compiles a package once and loads a function of it."""
        model: LoadedModel = self._kit.models.CompiledMLModel(
            self._compile(package), compute_units=self._units, function_name=function
        )
        return model

    def benchmark(
        self, package: Path, function: str | None, inputs: Mapping[str, Array], iterations: int
    ) -> dict[str, list[float]]:
        """Times a function with coremltools' own `MLModelBenchmarker`."""
        from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker

        model = self._kit.models.MLModel(
            str(package), compute_units=self._units, function_name=function
        )
        benchmarker = MLModelBenchmarker(model=model)

        async def measure() -> dict[str, list[float]]:
            load = await benchmarker.benchmark_load(iterations=1)
            predict = await benchmarker.benchmark_predict(
                inputs=dict(inputs), iterations=iterations, warmup=True
            )
            return {"load_ms": list(load.samples), "predict_ms": list(predict.samples)}

        return asyncio.run(measure())

    def plan(self, package: Path, function: str | None) -> list[dict[str, Any]]:
        """Reads the compute plan; constants have no device and are left out."""
        from coremltools.models.compute_plan import MLComputePlan

        plan = MLComputePlan.load_from_path(path=self._compile(package), compute_units=self._units)
        functions = plan.model_structure.program.functions
        entry = functions[function] if function else next(iter(functions.values()))
        usage: Callable[[Any], Any] = plan.get_compute_device_usage_for_mlprogram_operation
        cost: Callable[[Any], Any] = plan.get_estimated_cost_for_mlprogram_operation
        rows = []
        for operation in entry.block.operations:
            found = usage(operation)
            if found is not None:
                weight = cost(operation)
                rows.append(
                    {
                        "operator": operation.operator_name,
                        "device": _device(found.preferred_compute_device),
                        "cost": None if weight is None else float(weight.weight),
                    }
                )
        return rows

    def _compile(self, package: Path) -> str:
        if package not in self._compiled:
            require_system(package, platform.mac_ver()[0])
            self._compiled[package] = self._kit.models.utils.compile_model(str(package))
        return self._compiled[package]


def require_system(package: Path, macos: str) -> None:
    """Refuses a package that is newer than the system.

    Args:
        package: The package.
        macos: Version of macOS.

    Raises:
        BundleError: The system cannot read it, or it is damaged.
    """
    version = MilPackage.open(package).specification_version
    lowest = LOWEST_SYSTEMS[version]
    if is_older(macos, lowest.macos):
        raise BundleError(
            f"{package}: specification {version} needs macOS {lowest.macos} (iOS {lowest.ios}) or "
            f"newer; this is macOS {macos}"
        )


def _device(device: Any) -> str:
    """`neural_engine`, `gpu` or `cpu`, by the class that coremltools returns."""
    kind = type(device).__name__
    return next(
        (
            name
            for part, name in (("Neural", "neural_engine"), ("GPU", "gpu"), ("CPU", "cpu"))
            if part in kind
        ),
        kind,
    )
