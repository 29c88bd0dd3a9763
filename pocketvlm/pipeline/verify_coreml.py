"""Compares Core ML packages with the checkpoint: by the reference evaluator, or by Core ML itself.

`evaluate_coreml` runs anywhere. `verify_coreml` needs an Apple machine, makes the same certificate
with the real runtime, times every function, reads where its operators run, and writes all of it
into the bundle.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketvlm.bundle import Bundle
from pocketvlm.context import RunContext
from pocketvlm.errors import CheckFailedError, CheckpointError, RecipeError, UnsupportedError
from pocketvlm.export.parity.certificate import ParityReport
from pocketvlm.export.parity.certify import certify
from pocketvlm.machine import Samples
from pocketvlm.pipeline.assemble import add_to_parity
from pocketvlm.pipeline.questions import Questions, choose_samples
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.runtime.coreml.apple import COMPUTE_UNITS
from pocketvlm.runtime.coreml.session import WORKER, RemoteRunner, measure_function
from pocketvlm.runtime.engines import ENGINES, Engine
from pocketvlm.runtime.runner import Runner

__all__ = [
    "FunctionMeasurement",
    "Verification",
    "evaluate_coreml",
    "verify_coreml",
]

_TARGET = "coreml"
_BLOCK = "core_ml"
"""The key of Core ML's own results in parity.json."""


@dataclass(frozen=True, kw_only=True)
class FunctionMeasurement:
    """Core ML's measurements of one function.

    Attributes:
        file: The package inside the bundle.
        function: Its function; `None` for the only one.
        load_ms: Raw samples of loading.
        predict_ms: Raw samples of predicting: a whole chunk of rows, or one.
        plan: Where each operator should run, and its estimated share of the cost.
    """

    file: str
    function: str | None
    load_ms: tuple[float, ...]
    predict_ms: tuple[float, ...]
    plan: tuple[Mapping[str, Any], ...]

    @property
    def operator_shares(self) -> dict[str, float]:
        """Share of the operators, by device."""
        return self._shares([1.0] * len(self.plan))

    @property
    def cost_shares(self) -> dict[str, float]:
        """Share of the estimated cost, by device."""
        return self._shares([float(row["cost"] or 0) for row in self.plan])

    def to_json(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        return {
            "file": self.file,
            "function": self.function,
            "load_ms": {"samples": list(self.load_ms), "median": _median(self.load_ms)},
            "predict_ms": {"samples": list(self.predict_ms), "median": _median(self.predict_ms)},
            "operators": len(self.plan),
            "operator_shares": self.operator_shares,
            "cost_shares": self.cost_shares,
            "not_on_neural_engine": sorted(
                {str(row["operator"]) for row in self.plan if row["device"] != "neural_engine"}
            ),
        }

    def _shares(self, weights: Sequence[float]) -> dict[str, float]:
        total = sum(weights)
        shares: dict[str, float] = {}
        for row, weight in zip(self.plan, weights, strict=True):
            device = str(row["device"])
            shares[device] = shares.get(device, 0.0) + (weight / total if total else 0.0)
        return dict(sorted(shares.items()))


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of a verification.

    Attributes:
        certificate: The parity certificate; `None` if Core ML did not get that far.
        functions: Measurements of each function.
        failures: One line per failure.
    """

    certificate: ParityReport | None
    functions: tuple[FunctionMeasurement, ...]
    failures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The verification as JSON values."""
        return {
            "passed": not self.failures,
            "certificate": self.certificate.to_json()["targets"] if self.certificate else None,
            "functions": [function.to_json() for function in self.functions],
            "failures": list(self.failures),
        }


def evaluate_coreml(path: Path, questions: Questions, ctx: RunContext) -> ParityReport:
    """Reads a bundle's Core ML packages back and certifies them with the reference evaluator.

    Raises:
        BundleError: There are no Core ML packages, or one cannot be read.
        CheckpointError: There is no checkpoint to compare with.
    """
    return _certify(Bundle.open(path), questions, ENGINES[_TARGET], ctx)


def verify_coreml(
    path: Path,
    questions: Questions,
    ctx: RunContext,
    *,
    units: str = "ALL",
    iterations: int = 20,
    worker: Sequence[str] = WORKER,
) -> Verification:
    """Certifies and times a bundle with Core ML itself, and writes the result into the bundle.

    Every use of Core ML has its own process. If one fails, the verification fails, and the others
    continue.

    Args:
        path: The bundle.
        questions: The questions.
        ctx: The run, for progress.
        units: The compute units that Core ML may use.
        iterations: Timed predictions of each function.
        worker: The command that runs Core ML.

    Raises:
        RecipeError: The compute units are unknown.
        UnsupportedError: This is not an Apple machine.
        BundleError: There are no Core ML packages, or one cannot be read.
        CheckpointError: There is no checkpoint to compare with.
    """
    if units not in COMPUTE_UNITS:
        raise RecipeError(f"units are {units!r}; allowed are {', '.join(COMPUTE_UNITS)}")
    if worker is WORKER and sys.platform != "darwin":
        raise UnsupportedError(
            "verify-coreml asks Core ML itself, which runs on Apple machines alone; here, "
            "`pocketvlm inspect BUNDLE --evaluate` computes the packages with the reference "
            "evaluator"
        )
    bundle = Bundle.open(path)
    failures: list[str] = []
    certificate = _certify_remotely(bundle, questions, ctx, units, worker, failures)
    functions = _measure(bundle, ctx, units, iterations, worker, failures)
    found = Verification(
        certificate=certificate, functions=tuple(functions), failures=tuple(failures)
    )
    add_to_parity(bundle, {_BLOCK: found.to_json()})
    return found


def _certify(bundle: Bundle, questions: Questions, engine: Engine, ctx: RunContext) -> ParityReport:
    """The certificate of the Core ML target alone."""
    bundle.component(_TARGET, "decoder")  # lists what there is, if there is none
    checkpoint_path = questions.checkpoint or bundle.path.parent / "checkpoint"
    if not checkpoint_path.is_dir():
        raise CheckpointError(
            f"{checkpoint_path}: no checkpoint here to compare the packages with; name the one "
            "that the bundle was made from with --checkpoint"
        )
    own = tuple(c for c in bundle.manifest.components if c.target == _TARGET)
    return certify(
        load_checkpoint(checkpoint_path),
        replace(bundle, manifest=replace(bundle.manifest, components=own)),
        choose_samples(bundle, questions),
        tokens=questions.tokens,
        engines={_TARGET: engine},
        ctx=ctx,
    )


def _certify_remotely(
    bundle: Bundle,
    questions: Questions,
    ctx: RunContext,
    units: str,
    worker: Sequence[str],
    failures: list[str],
) -> ParityReport | None:
    opened: list[RemoteRunner] = []

    def start(found: Bundle, _threads: int | None, _rows: int) -> Runner:
        opened.append(RemoteRunner(found, units=units, worker=worker))
        return opened[-1]

    try:
        certificate = _certify(bundle, questions, start, ctx)
    except CheckFailedError as error:
        failures.append(str(error))
        return None
    finally:
        for runner in opened:
            runner.close()
    failures.extend(certificate.failures())
    return certificate


def _measure(
    bundle: Bundle,
    ctx: RunContext,
    units: str,
    iterations: int,
    worker: Sequence[str],
    failures: list[str],
) -> list[FunctionMeasurement]:
    entries = list(
        dict.fromkeys(
            (c.file, c.function) for c in bundle.manifest.components if c.target == _TARGET
        )
    )
    measured = []
    for number, (file, function) in enumerate(entries):
        ctx.report("core ml", number, len(entries), f"{file} {function or ''}".strip())
        try:
            found = measure_function(
                bundle.path / file, function, units=units, iterations=iterations, worker=worker
            )
        except CheckFailedError as error:
            failures.append(str(error))
            continue
        measured.append(
            FunctionMeasurement(
                file=file,
                function=function,
                load_ms=tuple(found["load_ms"]),
                predict_ms=tuple(found["predict_ms"]),
                plan=tuple(found["plan"]),
            )
        )
    ctx.report("core ml", len(entries), len(entries), f"{len(measured)} functions")
    return measured


def _median(values: Sequence[float]) -> float | None:
    return Samples(values=tuple(values)).quantile(0.5) if values else None
