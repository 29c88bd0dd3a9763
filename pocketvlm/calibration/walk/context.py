"""What all parts of a walk share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pocketvlm.calibration.walk.activations import ActivationStore
from pocketvlm.calibration.walk.paired_activations import PairedActivations
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import ALONE, Ranks
from pocketvlm.weights.form import WeightForm

__all__ = ["WalkContext"]


@dataclass(frozen=True, kw_only=True, eq=False)
class WalkContext:
    """The model that is walked, and how its states are kept.

    Attributes:
        checkpoint: The model; its weights may be replaced between two steps.
        spill_folder: Where activations go that do not fit into memory.
        carry_float: Whether the float model runs along.
        ranks: The processes that share the samples.
    """

    checkpoint: Checkpoint
    spill_folder: Path | None
    carry_float: bool
    ranks: Ranks = ALONE

    def store(self) -> ActivationStore:
        """An empty store of states."""
        return ActivationStore(self.spill_folder, device=self.checkpoint.device)

    def paired(self) -> PairedActivations:
        """Empty stores of both models' states."""
        return PairedActivations(now=self.store(), ideal=self.store() if self.carry_float else None)

    def width(self, *names: str) -> int:
        """Channels of the input that some linears share."""
        return self.checkpoint.form(names[0]).shape[1]

    def originals(self, names: Iterable[str]) -> dict[str, WeightForm]:
        """What linears hold before a caller replaces it; empty where no float model runs along."""
        return {name: self.checkpoint.form(name) for name in names if self.carry_float}
