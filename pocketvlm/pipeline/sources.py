"""What the command line's names stand for: models, calibration sets and evaluation data."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.errors import CalibrationError, CheckpointError
from pocketvlm.modelspec import ModelSpec
from pocketvlm.recipes.load import CalibrationOptions
from pocketvlm.recipes.stages import reducer_builders
from pocketvlm.reference import REFERENCE_MODELS, reference_model_path

__all__ = [
    "load_checkpoint",
    "load_evaluation",
    "resolve_calibration",
    "resolve_model",
]


def resolve_model(name: str) -> Path:
    """The directory of a model.

    Args:
        name: A local directory, `reference:NAME`, `shape:NAME` (seeded random weights at a
            published shape, written to the temporary folder once) or the id of a hub repository
            that is in the local cache or can be downloaded.

    Raises:
        CheckpointError: No model has this name.
    """
    scheme, separator, rest = name.partition(":")
    if separator and scheme == "reference":
        try:
            return reference_model_path(rest)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if separator and scheme == "shape":
        from pocketvlm.testing import write_shape

        return write_shape(rest, Path(tempfile.gettempdir()) / "pocketvlm-shapes" / rest)
    path = Path(name)
    if path.exists():
        return path
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _download(name)
    known = ", ".join(f"reference:{model}" for model in REFERENCE_MODELS)
    raise CheckpointError(
        f"{name}: no such directory; a model is a local directory, a hub id (owner/name), "
        f"shape:NAME, or one of {known}"
    )


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Loads any checkpoint directory, visual-token reduction included.

    Raises:
        CheckpointError: The directory is missing, damaged or holds pickled weights only.
        UnsupportedError: The model's family is not supported.
    """
    return Checkpoint.load(path, reducers=reducer_builders())


def resolve_calibration(
    options: CalibrationOptions, *, is_reference: bool, spec: ModelSpec
) -> CalibrationSet:
    """The calibration set that a recipe asks for.

    Raises:
        CalibrationError: It names a folder that holds no usable samples.
    """
    source = options.source
    if source == "auto":
        source = "reference" if is_reference else "synthetic"
    if source == "reference":
        return CalibrationSet.from_reference(seed=options.seed, n=options.samples)
    if source == "synthetic":
        return CalibrationSet.synthetic(n=options.samples, seed=options.seed)
    return CalibrationSet.from_folder(Path(source)).take(options.samples)


def load_evaluation(data: str, n: int) -> CalibrationSet:
    """Evaluation samples: a folder, or `reference:SEED` for held-out generated scenes.

    Raises:
        CalibrationError: There is no such data.
    """
    scheme, separator, seed = data.partition(":")
    if separator and scheme == "reference":
        if not seed.isdecimal():
            raise CalibrationError(f"--data {data}: the seed must be a whole number")
        return CalibrationSet.from_reference(seed=int(seed), n=n, split="evaluation")
    return CalibrationSet.from_folder(Path(data)).take(n)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name}: is neither a local directory nor to be had from the hub: {first_line}"
        ) from error
