"""The page's content about a stage: its parameters, its outcome, and a table of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocketvlm.reports.elements import Column, Table
from pocketvlm.reports.formatting import facts_of, format_bytes, number_of, text_of
from pocketvlm.reports.report import Stage

__all__ = ["StageView", "view_stage"]

# The first columns; others follow in the order in which the stage wrote them.
_LAYER_COLUMNS = (
    "name",
    "method",
    "grid",
    "sparsity",
    "bits",
    "bits_per_weight",
    "loss",
    "loss_rtn",
    "loss_magnitude",
    "damping",
    "dead_columns",
    "seconds",
    "reason",
)
_HIDDEN_COLUMNS = ("role", "block")


@dataclass(frozen=True, kw_only=True)
class StageView:
    """One stage of the pipeline, with its layers."""

    method: str
    parameters: tuple[tuple[str, str], ...]
    outcome: tuple[tuple[str, str], ...]
    layers: Table | None


def view_stage(stage: Stage) -> StageView:
    """One stage record."""
    found = [key for layer in stage.layers for key in layer]
    columns = [name for name in _LAYER_COLUMNS if name in found]
    columns += [
        name for name in dict.fromkeys(found) if name not in columns and name not in _HIDDEN_COLUMNS
    ]
    outcome = (
        ("time", "–" if stage.seconds is None else f"{stage.seconds:.1f} s"),
        ("peak memory", format_bytes(stage.peak_rss_bytes)),
        ("calibration", text_of(stage.calibration_sha256)[:12]),
    )
    parameters = {key: value for key, value in stage.parameters.items() if key != "method"}
    return StageView(
        method=stage.method,
        parameters=facts_of(parameters),
        outcome=(*outcome, *facts_of(stage.metrics)),
        layers=_layers(stage, columns) if stage.layers else None,
    )


def _layers(stage: Stage, columns: Sequence[str]) -> Table:
    return Table(
        caption=f"Layers of {stage.method}",
        columns=tuple(
            Column(
                title=name.replace("_", " "),
                is_number=any(number_of(layer.get(name)) is not None for layer in stage.layers),
            )
            for name in columns
        ),
        rows=tuple(
            tuple(
                format_bytes(number_of(layer.get(name)))
                if name.endswith("_bytes")
                else text_of(layer.get(name))
                for name in columns
            )
            for layer in stage.layers
        ),
    )
