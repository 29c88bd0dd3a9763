"""A run that several processes share: the first owns its folder, the others help with its stages.

Before every stage that follows another one, all are given the checkpoint that the first has stored:
what one process decides is then what all of them have, down to the last bit. After the last stage
that is shared the others are done.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.context import Ranks, RunContext
from pocketvlm.errors import RankError
from pocketvlm.pipeline.compute_device import describe_device
from pocketvlm.pipeline.identity import RunIdentity, conditions
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.recipes.load import Recipe
from pocketvlm.recipes.stages import layer_bytes_by_target
from pocketvlm.stages import Stage

__all__ = [
    "beside",
    "count_shared",
    "help_run",
    "note_sharing",
    "require_agreement",
    "stage_context",
]


def help_run(model: Path, recipe: Recipe, *, calibration: CalibrationSet, ctx: RunContext) -> None:
    """Does the part of a process that does not own the run.

    Args:
        model: A checkpoint directory, with the same content as the first process's.
        recipe: The recipe.
        calibration: The calibration set of the stages.
        ctx: Seed, threads, and the processes.

    Raises:
        RankError: Another process has ended, or the processes do not work on the same run.
        PocketVLMError: The input is wrong, or the disk is full.
    """
    ranks, checkpoint = ctx.ranks, load_checkpoint(model)
    require_agreement(ctx, RunIdentity.of(model, checkpoint, recipe, calibration, ctx.seed))
    ctx = stage_context(ctx, model, recipe)
    first = ranks.first(None)
    with tempfile.TemporaryDirectory(prefix="pocketvlm-") as name:
        for index in range(first, count_shared(recipe.stages, ranks)):
            stage, scratch = recipe.stages[index], Path(name) / str(index)
            if index > 0:
                ranks.spread_folder(scratch / "checkpoint")
                checkpoint = load_checkpoint(scratch / "checkpoint")
            if stage.shares_work:
                (scratch / "layers").mkdir(parents=True)
                stage.apply(checkpoint, calibration, ctx.with_scratch(scratch / "layers"))


def stage_context(ctx: RunContext, model: Path, recipe: Recipe) -> RunContext:
    """What the stages of a recipe may know of their run."""
    return replace(ctx, source_dir=model, layer_bytes=layer_bytes_by_target(recipe.targets))


def count_shared(stages: Sequence[Stage], ranks: Ranks) -> int:
    """How many stages there are up to the last that processes share."""
    if ranks.count == 1:
        return 0
    return max((index + 1 for index, stage in enumerate(stages) if stage.shares_work), default=0)


def require_agreement(ctx: RunContext, identity: RunIdentity) -> None:
    """Checks that all processes work on the same run, under the same conditions.

    Raises:
        RankError: One of them does not.
    """
    found = ctx.ranks.documents({**asdict(identity), **conditions(), **beside(ctx)})
    for rank, theirs in enumerate(found):
        names = dict.fromkeys((*found[0], *theirs))
        other = [name for name in names if theirs.get(name) != found[0].get(name)]
        if other:
            # Other weights are another model.
            what = " and ".join(name for name in other if name != "weights")
            raise RankError(
                f"process {rank} has another {what} than process 0; all that share a run need "
                "the same model, recipe, calibration set, seed, versions, threads and processor"
            )


def beside(ctx: RunContext) -> dict[str, Any]:
    """Conditions of stages alone: sums are taken rank by rank, and by a device in its own way."""
    found: dict[str, Any] = {}
    if ctx.ranks.count > 1:
        found["processes"] = ctx.ranks.count
    if ctx.device != "cpu":
        found["device"] = describe_device(ctx.device)
    return found


def note_sharing(stages: Sequence[Stage], ctx: RunContext) -> tuple[str, ...]:
    """What the report says of a run of several processes, or on a device."""
    notes = []
    if ctx.device != "cpu":
        notes.append(f"stages computed on {ctx.device}, {describe_device(ctx.device)}")
    if ctx.ranks.count == 1:
        return tuple(notes)
    shared = [stage.method for stage in stages if stage.shares_work]
    alone = [stage.method for stage in stages if not stage.shares_work]
    count = ctx.ranks.count
    notes.append(f"{count} processes shared the work of {', '.join(shared) or 'no stage'}")
    if alone:
        notes.append(f"one of {count} processes did the work of {', '.join(alone)}")
    return tuple(notes)
