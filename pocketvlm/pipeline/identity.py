"""Identity: digests of what a run, and each of its stages, depends on.

A run is its model, recipe, calibration set and seed. A stage's result depends on more: on the
versions of the libraries, and on the number of threads, which changes the order of sums. Work done
under other conditions is not reused but repeated, so that an interrupted run ends with the bytes of
one that was not interrupted.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.mixed.stage import MixedPrecision
from pocketvlm.compress.tokens.imported import Imported
from pocketvlm.compress.tokens.stage import ReduceTokens
from pocketvlm.errors import RecipeError
from pocketvlm.files.reader import file_sha256, read_bytes
from pocketvlm.machine import toolchain_versions
from pocketvlm.recipes.load import Recipe

__all__ = ["RunIdentity", "conditions", "model_sha256", "stage_keys", "stage_settings"]

_COMPUTES = ("pocketvlm", "torch", "transformers", "tokenizers", "numpy", "pillow", "scipy")
_TEXTS = (".json", ".jinja", ".model", ".txt")
"""Suffixes of the files other than weights that a model is read from."""

_UNREAD = frozenset({"license.txt", "readme.txt"})


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The run that a folder belongs to.

    Attributes:
        model: Digest of the model's weights, configuration, tokenizer and processor.
        weights: Digest of its weights alone, as in bundles and checkpoints.
        recipe: Digest of the resolved recipe.
        calibration: Digest of the calibration set.
        seed: Seed of every random choice.
    """

    model: str
    weights: str
    recipe: str
    calibration: str
    seed: int

    @classmethod
    def of(
        cls,
        model: Path,
        checkpoint: Checkpoint,
        recipe: Recipe,
        calibration: CalibrationSet,
        seed: int,
    ) -> RunIdentity:
        """The run of a model's folder, which was loaded as `checkpoint`."""
        return cls(
            model=model_sha256(model, checkpoint.source.sha256),
            weights=checkpoint.source.sha256,
            recipe=recipe.sha256(),
            calibration=calibration.sha256,
            seed=seed,
        )

    @property
    def key(self) -> str:
        """Digest of all of it."""
        return _digest(asdict(self))


def conditions() -> dict[str, Any]:
    """What a stage's result depends on besides the run: versions, threads, the processor's kind."""
    return {
        "versions": toolchain_versions(_COMPUTES),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def stage_keys(*before: Any, stages: Sequence[Any]) -> list[str]:
    """One key per stage; it changes with whatever that stage's result depends on.

    Args:
        before: What the first stage's result depends on, as JSON values.
        stages: The stages' settings, as JSON values.
    """
    key = _digest(before)
    keys = []
    for stage in stages:
        key = _digest([key, stage])
        keys.append(key)
    return keys


def stage_settings(recipe: Recipe) -> list[Any]:
    """The settings of every stage, with digests of the files that they name.

    Raises:
        RecipeError: Such a file cannot be read.
    """
    settings: list[Any] = list(recipe.to_document()["stages"])
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, MixedPrecision) and stage.sensitivity is not None:
            content = read_bytes(Path(stage.sensitivity), error=RecipeError)
            settings[index] = [settings[index], hashlib.sha256(content).hexdigest()]
        if isinstance(stage, ReduceTokens) and isinstance(stage.reducer, Imported):
            settings[index] = [settings[index], stage.reducer.source_sha256()]
    return settings


def model_sha256(model: Path, weights_sha256: str) -> str:
    """Digest of a model's folder: its weights, and every small file that is read."""
    names = sorted(
        path.relative_to(model).as_posix()
        for pattern in ("*", "*/*.jinja")
        for path in model.glob(pattern)
        if path.suffix in _TEXTS and path.name.lower() not in _UNREAD and path.is_file()
    )
    return _digest([weights_sha256, {name: file_sha256(model / name) for name in names}])


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
