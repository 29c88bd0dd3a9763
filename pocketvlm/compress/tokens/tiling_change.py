"""What stages share that have pictures cut in another way."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.models.images.tilings import Tiling
from pocketvlm.stages import StageResult

if TYPE_CHECKING:
    from pocketvlm.calibration.source import CalibrationSet

__all__ = ["change_tiling"]


def change_tiling(
    method: str,
    tiling: Tiling,
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    ctx: RunContext,
) -> StageResult:
    """Gives the processor another tiling; counts the tiles of the calibration set.

    Args:
        method: The stage's, for its progress.
        tiling: How pictures are cut from now on.
        checkpoint: The model.
        calibration: Pictures, of which only the sizes count.
        ctx: Told of the numbers of tiles, which are metrics as well.

    Raises:
        CalibrationError: A picture cannot be read.
    """
    processor = checkpoint.processor.with_tiling(tiling)
    before, after = (
        sum(grid.tiles for sample in calibration.samples for grid in sample.grids(cutter))
        for cutter in (checkpoint.processor, processor)
    )
    ctx.report(method, 1, 1, f"{after} for {before} tiles of the calibration set")
    return StageResult(
        checkpoint=replace(
            checkpoint, processor=processor, spec=replace(checkpoint.spec, tiling=tiling)
        ),
        is_calibrated=False,
        metrics={"tiles": after, "before": before},
    )
