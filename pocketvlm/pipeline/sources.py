"""Resolves names on the command line: models, calibration sets and evaluation data."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint, read_config, read_model_folder, read_spec
from pocketvlm.context import RunContext
from pocketvlm.errors import CalibrationError, CheckpointError, InputError, RecipeError
from pocketvlm.evaluation.score import Score, score_bundle, score_checkpoint
from pocketvlm.models.images.reading import IMAGE_SETTINGS_FILES, read_image_settings
from pocketvlm.models.spec import ModelSpec
from pocketvlm.processor import Processor
from pocketvlm.recipes.load import CalibrationOptions, Recipe, default_target
from pocketvlm.recipes.stages import REDUCER_BUILDERS
from pocketvlm.reference import REFERENCE_MODELS, Pictures, reference_model_path
from pocketvlm.reference.shapes import Shape, load_shape
from pocketvlm.reference_graph.activation_rounding import ARITHMETICS, Arithmetic
from pocketvlm.runtime.vision import ANY_VISION, VisionChoice, only_vision

__all__ = [
    "GENERATED_SOURCES",
    "find_model",
    "inspect_model",
    "load_checkpoint",
    "load_evaluation",
    "long_call_rows",
    "resolve_calibration",
    "resolve_model",
    "score_subject",
    "select_targets",
]

_LONGEST_SEED = 18
_PHOTOS = "photos"


GENERATED_SOURCES = ("auto", "reference", "mosaics", "synthetic")
"""Calibration sources that are generated, not read from a folder."""


def resolve_model(name: str) -> Path:
    """The directory of a model.

    Args:
        name: A local directory, `reference:NAME`, `shape:NAME` (seeded random weights at a
            published shape, written to the temporary folder once) or the id of a hub repository
            that is in the local cache or can be downloaded.

    Raises:
        CheckpointError: There is no model of this name.
    """
    found = find_model(name)
    if isinstance(found, Path):
        return found
    from pocketvlm.reference.random_models import write_shape

    return write_shape(found, Path(tempfile.gettempdir()) / "pocketvlm-shapes" / found.name)


def find_model(name: str) -> Path | Shape:
    """What a plan needs of a model: arguments and errors are those of `resolve_model`.

    Returns:
        A directory, or the shape that `shape:NAME` is, for which no weight is written.
    """
    scheme, separator, rest = name.partition(":")
    if separator and scheme == "reference":
        try:
            return reference_model_path(rest)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if separator and scheme == "shape":
        return load_shape(rest)
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


def inspect_model(model: Path | Shape) -> tuple[ModelSpec, tuple[str, ...]]:
    """The specification of a checkpoint directory or shape, and notes about it.

    Only configuration and the headers of the weight files are read. A directory with a config.json
    and without weights is enough for a plan, and so is one without an image processor's settings;
    notes say so.

    Raises:
        CheckpointError: The directory is missing or damaged, or lacks a weight.
        UnsupportedError: The model's family is not supported.
    """
    if isinstance(model, Shape):
        note = f"the shape of {model.source}, without its weights; compressing it takes random ones"
        return model.spec, (note,)
    if model.is_dir() and not any(model.glob("*.safetensors*")) and not any(model.glob("*.bin*")):
        return _inspect_configuration(model)
    folder = read_model_folder(model)
    processor = Processor.load(model, folder.spec)
    return processor.spec, (*folder.notes, *processor.notes)


def _inspect_configuration(folder: Path) -> tuple[ModelSpec, tuple[str, ...]]:
    spec = read_spec(read_config(folder))
    notes = ["no weights are here: what is missing, ignored or tied could not be checked"]
    if not any((folder / name).exists() for name in IMAGE_SETTINGS_FILES):
        notes.append(
            f"no {' or '.join(IMAGE_SETTINGS_FILES)} is here: how pictures are cut and how large "
            "they become is not known, and tokens are those of config.json"
        )
        return spec, tuple(notes)
    settings = read_image_settings(folder, spec.family, error=CheckpointError)
    leaves_out = settings.empty_tiles is not None
    spec = replace(spec.sized_by(settings), tiling=settings.tiling, leaves_tiles_out=leaves_out)
    return spec, tuple(notes)


def select_targets(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with the targets of these names; its own options of a target are kept.

    Raises:
        RecipeError: There is no such target, or the recipe names none and neither does the user.
    """
    if not names:
        if not recipe.targets:
            raise RecipeError(f"recipe {recipe.name}: names no target; pass --target onnx")
        return recipe
    own = {target.method: target for target in recipe.targets}
    chosen = tuple(own.get(name) or default_target(name) for name in dict.fromkeys(names))
    return replace(recipe, targets=chosen)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Loads any checkpoint directory, including its visual-token reduction.

    Raises:
        CheckpointError: The directory is missing, damaged or holds pickled weights only.
        UnsupportedError: The model's family is not supported.
    """
    return Checkpoint.load(path, reducers=REDUCER_BUILDERS)


def resolve_calibration(
    options: CalibrationOptions, *, pictures: Pictures | None
) -> CalibrationSet:
    """The calibration set that a recipe asks for.

    Args:
        options: The recipe's.
        pictures: What the model was trained on, where it is a reference model.

    Raises:
        CalibrationError: It names a folder that holds no usable samples.
    """
    source = options.source
    if source == "auto":
        source = pictures or "synthetic"
    if source in ("reference", "mosaics"):
        return CalibrationSet.from_reference(
            seed=options.seed, n=options.samples, pictures=cast("Pictures", source)
        )
    if source == "synthetic":
        return CalibrationSet.synthetic(n=options.samples, seed=options.seed)
    if source == _PHOTOS or source.startswith(f"{_PHOTOS}:"):
        _, colon, folder = source.partition(":")
        if colon and not folder.strip():
            raise CalibrationError(f"calibration.source: {source} names no folder of photographs")
        return CalibrationSet.from_photos(
            n=options.samples, seed=options.seed, folder=folder or None
        )
    try:
        return CalibrationSet.from_folder(Path(source), limit=options.samples)
    except OSError as error:  # a name that no file system accepts
        raise CalibrationError(f"calibration.source: {error.strerror}: {source[:60]}") from error


def load_evaluation(data: str, n: int) -> CalibrationSet:
    """Evaluation samples: a folder, or held-out generated scenes.

    `reference:SEED` are scenes, `mosaics:SEED` pictures of several scenes.

    Raises:
        CalibrationError: There is no such data.
    """
    scheme, separator, seed = data.partition(":")
    if separator and scheme in ("reference", "mosaics"):
        if not seed.isdecimal() or len(seed) > _LONGEST_SEED:
            raise CalibrationError(
                f"--data {data[:60]}: the seed must be a whole number of up to "
                f"{_LONGEST_SEED} digits"
            )
        return CalibrationSet.from_reference(
            seed=int(seed), n=n, split="evaluation", pictures=cast("Pictures", scheme)
        )
    return CalibrationSet.from_folder(Path(data), limit=n, require_images=False)


def long_call_rows(subject: str) -> int | None:
    """From how many rows the ONNX bundle beside a run's checkpoint runs prompts on int8 rows.

    Args:
        subject: What is scored; `None` comes back unless it is the checkpoint of a run.

    Raises:
        BundleError: The bundle's manifest is damaged.
    """
    beside = Path(subject).resolve().parent / "bundle"
    if not (Path(subject).is_dir() and (beside / "manifest.json").is_file()):
        return None
    manifest = Bundle.open(beside, verify=False).manifest
    if not manifest.has("onnx", "prefill"):
        return None
    return next(each.least_rows for each in manifest.components if each.role == "prefill")


def score_subject(
    subject: str,
    samples: CalibrationSet,
    ctx: RunContext,
    arithmetic: str = "float32",
    runtime: str | None = None,
    vision: VisionChoice = ANY_VISION,
    int8_prefill_rows: int | None = None,
) -> Score:
    """Scores a bundle, or anything that `resolve_model` understands, with the same code.

    Args:
        subject: The bundle or model.
        samples: The questions.
        ctx: The run.
        arithmetic: The runtime whose rounding of activations is simulated for a checkpoint.
        runtime: The engine that runs a bundle; `None` for the first that it has graphs for.
        vision: The vision graph of a bundle that sees all pictures; the first one by default.
        int8_prefill_rows: Rows from which prompts are simulated on int8 rows, with `onnx`.

    Raises:
        InputError: The arithmetic is unknown, or given for a bundle; the runtime or vision graph is
            unknown, or given for a checkpoint; rows are given without the arithmetic that has them.
        PocketVLMError: The subject is neither a bundle nor a model.
    """
    if arithmetic not in ARITHMETICS:
        raise InputError(f"arithmetic is {arithmetic!r}; allowed are {', '.join(ARITHMETICS)}")
    if int8_prefill_rows is not None and arithmetic != "onnx":
        raise InputError(f"int8_prefill_rows goes with arithmetic 'onnx', not with {arithmetic!r}")
    if (Path(subject) / "manifest.json").is_file():
        if arithmetic != "float32":
            raise InputError(
                f"{subject}: is a bundle, which has the arithmetic of its runtime; "
                f"{arithmetic!r} can be simulated for a checkpoint"
            )
        bundle = only_vision(Bundle.open(Path(subject)), vision)
        return score_bundle(bundle, samples, runtime=runtime, ctx=ctx)
    if runtime is not None:
        raise InputError(f"{subject}: is not a bundle; --runtime chooses what runs a bundle")
    if vision != ANY_VISION:
        raise InputError(
            f"{subject}: is not a bundle; --visual-tokens and --resolution choose a bundle's graph"
        )
    checkpoint = load_checkpoint(resolve_model(subject))
    return score_checkpoint(
        checkpoint,
        samples,
        ctx=ctx,
        arithmetic=cast("Arithmetic", arithmetic),
        int8_prefill_rows=int8_prefill_rows,
    )


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
            f"{name}: is neither a local directory nor available from the hub: {first_line}"
        ) from error
