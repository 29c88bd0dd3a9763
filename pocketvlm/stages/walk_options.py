"""Options of the stages that read the inputs of layers on a walk over the model."""

from __future__ import annotations

from dataclasses import dataclass

from pocketvlm.calibration.data.modality import ModalityWeighting, check_weighting
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.calibration.walk.walk import BlockWalk
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext

__all__ = ["WalkOptions", "note_synthetic"]

_LARGEST_HELD_OUT = 0.5  # at most half may be lost to judging


@dataclass(frozen=True, kw_only=True)
class WalkOptions:
    """What they have in common; a stage whose default is another declares that option again.

    Attributes:
        modality_weights: Weight of visual tokens in the decoder's statistics: `uniform`, `balanced`
            (both modalities weigh the same in total), `gradient` (every token by its gradient) or
            a number (text weighs one).
        held_out: Share of the samples that only judge.
        tower_tokens: Tokens after which the tower's statistics are taken to be known.
    """

    modality_weights: ModalityWeighting = "balanced"
    held_out: float = 0.125
    tower_tokens: int = 16384

    @property
    def carries_float(self) -> bool:
        """Whether the float model runs along, which costs a second forward pass."""
        return False

    def check_walk_options(self) -> None:
        """Checks the three fields.

        Raises:
            ValueError: One is out of range; the message names it and what is allowed.
        """
        if not 0 <= self.held_out <= _LARGEST_HELD_OUT:
            raise ValueError(
                f"held_out must lie between 0 and {_LARGEST_HELD_OUT}, not {self.held_out}"
            )
        if self.tower_tokens < 1:
            raise ValueError(f"tower_tokens must be at least 1, not {self.tower_tokens}")
        check_weighting(self.modality_weights)

    def walk(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, ctx: RunContext
    ) -> BlockWalk:
        """One pass over the model with these options."""
        return BlockWalk(
            checkpoint=checkpoint,
            samples=calibration,
            weighting=self.modality_weights,
            held_out=self.held_out,
            tower_tokens=self.tower_tokens,
            spill_folder=ctx.scratch_dir,
            carry_float=self.carries_float,
            ranks=ctx.ranks,
        )


def note_synthetic(calibration: CalibrationSet, *, done: str = "calibrated") -> tuple[str, ...]:
    """What a record says where the pictures are not those of a task."""
    if not calibration.is_synthetic:
        return ()
    return (f"{done} on synthetic pictures: give a folder of real ones for quality",)
