"""What each option costs each layer, measured once: the divergence of the whole model's answers.

Every layer alone is replaced by the form that an option gives it, fitted by error feedback to the
float model's inputs, and the next-token distributions at the answers of held-out samples are
compared with the float model's. Losses of different layers are taken to add up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pocketvlm.calibration.gradients.divergence import DivergenceMeter
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.compress.layerwise.driver import measure_hessian, visit_groups
from pocketvlm.compress.layerwise.scratch import keep_document
from pocketvlm.compress.quantization.layer_quantizer import LayerQuantizer
from pocketvlm.compress.quantization.mixed.search_space import Option, label_of
from pocketvlm.compress.quantization.rules import Assignment
from pocketvlm.context import RunContext
from pocketvlm.errors import RecipeError
from pocketvlm.files.signed_folder import DIGEST_KEY, verify_document
from pocketvlm.models.layers import LinearSpec

__all__ = ["Measurement", "Sensitivity", "measure_sensitivity"]

_SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One layer at one option.

    Attributes:
        loss: Mean KL divergence of the answers' tokens from the float model's, in nats.
        bytes: Bytes of the layer's form.
    """

    loss: float
    bytes: int


@dataclass(kw_only=True)
class Sensitivity:
    """The table of all measurements, and what it holds for.

    Attributes:
        model: Digest of the model's weight files.
        stages: Tags of the stages before, with digests of their settings.
        calibration: Digest of the calibration set.
        tokens: Answer tokens that each figure is a mean over.
        layers: By layer's name and option's label.
    """

    model: str
    stages: tuple[str, ...]
    calibration: str
    tokens: int
    layers: dict[str, dict[str, Measurement]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The table as JSON values."""
        return {"schema": _SCHEMA, **asdict(self), "stages": list(self.stages)}

    def save(self, path: Path) -> None:
        """Writes the table aside and renames it into place."""
        keep_document(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Reads a table that `save` wrote, or that a report holds.

        Raises:
            RecipeError: The file is missing, no such table, or was changed after `save`.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            verify_document(document, path, error=RecipeError)
            document.pop(DIGEST_KEY, None)
            schema = document.pop("schema")
            layers = {
                name: {label: Measurement(**found) for label, found in row.items()}
                for name, row in document.pop("layers").items()
            }
            stages = tuple(document.pop("stages"))
            table = cls(**document, stages=stages, layers=layers)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"sensitivity {str(path)!r}: is not a table of measured sensitivity: {error}"
            ) from error
        if schema != _SCHEMA:
            raise RecipeError(f"sensitivity {str(path)!r}: has schema {schema}, not {_SCHEMA}")
        return table

    def holds_for(self, other: Sensitivity) -> bool:
        """Whether both were measured on the same model after the same stages."""
        return (self.model, self.stages) == (other.model, other.stages)

    def missing(self, wanted: Mapping[LinearSpec, Sequence[Option]]) -> int:
        """How many of the wanted measurements the table does not hold."""
        return sum(
            label_of(option) not in self.layers.get(linear.name, {})
            for linear, options in wanted.items()
            for option in options
        )


def measure_sensitivity(
    table: Sensitivity,
    wanted: Mapping[LinearSpec, Sequence[Option]],
    walk: BlockWalk,
    meter: DivergenceMeter,
    method: LayerQuantizer[Option],
    ctx: RunContext,
    on_layer: Callable[[], None],
) -> None:
    """Fills in what is missing of a table.

    Args:
        table: Extended in place, layer by layer.
        wanted: Options of each layer.
        walk: Over the float model; only its Hessians are used, no weight stays replaced.
        meter: On held-out samples of the same model.
        method: Gives layers their forms.
        ctx: Told of every measurement.
        on_layer: Called when a layer is complete.

    Raises:
        CalibrationError: Inputs or outputs are not finite.
        CheckpointError: A weight is too large for float16 scales.
    """
    checkpoint = walk.checkpoint
    by_name = {linear.name: linear for linear in wanted}
    total = sum(len(options) for options in wanted.values())
    done = total - table.missing(wanted)
    forwards = sum(
        meter.share_of_forward(linear.name)
        for linear, options in wanted.items()
        for _ in _open_options(options, table.layers.get(linear.name, {}))
    )
    ctx.report("sensitivity", done, total, f"costs {forwards:.0f} forward passes of the samples")
    for step, names in visit_groups(walk, by_name):
        # All options of all layers of a step are fitted to one pass over its input.
        once = replace(step, moments=None if step.moments is None else cache(step.moments))
        for name in names:
            linear, row = by_name[name], table.layers.setdefault(name, {})
            for option in _open_options(wanted[linear], row):
                task = Assignment[Option](linear=linear, rule=option)
                form = method.compress(
                    task,
                    checkpoint.form(name),
                    measure_hessian(checkpoint, once, [task], method),
                ).form
                loss = meter.divergence(name, form)
                row[label_of(option)] = Measurement(loss=loss, bytes=form.stored_bytes)
                done += 1
                ctx.report("sensitivity", done, total, f"{name}: {loss:.1e} at {label_of(option)}")
            on_layer()
        if done == total:
            return


def _open_options(options: Iterable[Option], row: Mapping[str, Measurement]) -> list[Option]:
    return [option for option in options if label_of(option) not in row]
