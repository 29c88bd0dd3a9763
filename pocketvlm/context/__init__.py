"""What work may know about the run that it is part of: passed, never global."""

from pocketvlm.context.ranks import ALONE, Ranks
from pocketvlm.context.run_context import (
    PrefillTimes,
    Progress,
    ProgressCallback,
    RunContext,
    derive_seed,
    ignore_progress,
)

__all__ = [
    "ALONE",
    "PrefillTimes",
    "Progress",
    "ProgressCallback",
    "Ranks",
    "RunContext",
    "derive_seed",
    "ignore_progress",
]
