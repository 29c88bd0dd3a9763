"""How fast this host compresses: what a calibration measured, kept beside that of its kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from pocketvlm.compress.quantization.affine.grid import GridKind
from pocketvlm.device_bench.prediction.calibration.host_file import (
    Condition,
    calibration_path,
    keep_measured,
    machine_identity,
    read_measured,
)
from pocketvlm.machine import toolchain_versions

__all__ = [
    "SCHEMA",
    "CompressCalibration",
    "CompressRates",
    "RoundingRates",
    "compress_calibration_path",
    "keep_compress_calibration",
    "read_compress_calibration",
    "torch_version",
]

SCHEMA = 1
"""The version of the file that this package writes and reads."""


@dataclass(frozen=True, kw_only=True)
class RoundingRates:
    """GPTQ's rounding of one layer, judged and packed, with one way to find grids.

    Attributes:
        column_us: What a column costs beside its weights, in microseconds.
        weight_ns: What a weight costs, in nanoseconds.
        feedback_macs_s: Products with the width of the layer for each weight, per second: the
            errors that are passed on, and the outputs that are judged.
    """

    column_us: float
    weight_ns: float
    feedback_macs_s: float

    def __post_init__(self) -> None:
        if self.column_us < 0 or self.weight_ns < 0 or not self.feedback_macs_s > 0:
            raise ValueError("column_us and weight_ns must be at least 0, feedback_macs_s above 0")

    def seconds(self, rows: int, columns: int, *, chunks: int) -> float:
        """Time of one layer, whose rows are rounded in this many chunks."""
        weights = rows * columns
        return (
            chunks * columns * self.column_us / 1e6
            + weights * self.weight_ns / 1e9
            + weights * columns / self.feedback_macs_s
        )


@dataclass(frozen=True, kw_only=True)
class CompressRates:
    """What torch reaches here with a number of threads, in float32 unless said otherwise.

    Attributes:
        threads: Threads.
        product_macs_s: Multiplications and additions per second of a batch with a weight matrix.
        attention_macs_s: Likewise of scores and sums among the tokens of a tile.
        moment_macs_s: Of second moments: one for each token and element of the matrix.
        factor_elements_s: Elements of a Hessian per second that are ordered, damped and checked
            when it is factorized, in float64.
        factor_macs_s: Its width to the third power per second, beside that.
        widened_weights_s: Weights per second that become float32 again before they are multiplied.
        rounding: By how a group's grid is found.
    """

    threads: int
    product_macs_s: float
    attention_macs_s: float
    moment_macs_s: float
    factor_elements_s: float
    factor_macs_s: float
    widened_weights_s: float
    rounding: Mapping[GridKind, RoundingRates]

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float | int) and not value > 0:
                raise ValueError(f"{item.name} is {value:g}; it must be above 0")

    def factorization_s(self, width: int) -> float:
        """Time to factorize a Hessian."""
        return width**2 / self.factor_elements_s + width**3 / self.factor_macs_s


@dataclass(frozen=True, kw_only=True)
class CompressCalibration:
    """Rates of this host, and when they hold.

    Attributes:
        schema: Version of the file.
        processor: The processor that was measured.
        cores: Logical cores that the system showed.
        torch: Version of the library whose kernels were measured.
        measured_at: When, in UTC.
        rates: What was reached, by the number of threads.
    """

    schema: int
    processor: str
    cores: int
    torch: str
    measured_at: str
    rates: tuple[CompressRates, ...]

    def at(self, threads: int) -> CompressRates | None:
        """The rates with a number of threads; `None` where they were not measured."""
        return next((one for one in self.rates if one.threads == threads), None)


def compress_calibration_path() -> Path:
    """Where it is kept, in the folder for what can be made again."""
    return calibration_path().with_name("compress-calibration.json")


def keep_compress_calibration(found: CompressCalibration) -> None:
    """Keeps a calibration for `read_compress_calibration`.

    Raises:
        StorageError: It cannot be written.
    """
    keep_measured(compress_calibration_path(), found)


def read_compress_calibration() -> CompressCalibration | str:
    """The calibration of this host, or why there is none that holds."""
    return read_measured(CompressCalibration, compress_calibration_path(), SCHEMA, _conditions)


def _conditions(found: CompressCalibration) -> Iterator[Condition]:
    processor, cores, _ = machine_identity()
    yield "processor", found.processor, processor
    yield "number of cores", found.cores, cores
    yield "version of torch", found.torch, torch_version()


def torch_version() -> str:
    """Version of the library that computes."""
    return str(toolchain_versions(["torch"])["torch"])
