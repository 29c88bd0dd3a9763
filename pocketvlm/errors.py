"""The exception tree: what a caller can do about a failure decides its class.

```text
PocketVLMError                exit code 2: the input was wrong, nothing was lost
├── CheckpointError           a model directory cannot be read
│   └── UnsupportedError      it can be read, but not by this family, stage or target
├── RecipeError               a recipe, rule or option is not valid
├── CalibrationError          calibration or evaluation data is missing or unreadable
├── BundleError               a bundle is damaged, or is not a bundle
├── InputError                a picture or a prompt cannot be used
├── MissingExtraError         an optional toolkit is not installed
├── ExportError               a toolkit could not convert a graph
├── HubError                  a hub refuses, cannot be reached, or holds something else
├── StorageError              a file cannot be written: a full disk, a quota, a read-only place
├── RankError                 a process that shares a run has ended, or works on something else
└── CheckFailedError          exit code 1: everything ran, and a bound was not met
    ├── SourceMismatchError   the checkpoint is read differently than stock transformers reads it
    ├── ParityError           the artifact does not answer like the model that was evaluated
    ├── ExpectationError      size, latency or quality is beyond what the recipe expects
    └── TooNoisyError         exit code 3: a bound lies inside the interval of a measurement
```

Every message is one line: what failed, where, and what is allowed. Programming errors stay
`TypeError`, `ValueError` and `AssertionError`.
"""

from collections.abc import Iterable, Sequence

__all__ = [
    "BundleError",
    "CalibrationError",
    "CheckFailedError",
    "CheckpointError",
    "ExpectationError",
    "ExportError",
    "HubError",
    "InputError",
    "MissingExtraError",
    "ParityError",
    "PocketVLMError",
    "RankError",
    "RecipeError",
    "SourceMismatchError",
    "StorageError",
    "TooNoisyError",
    "UnsupportedError",
    "join_problems",
    "name_some",
]


class PocketVLMError(Exception):
    """Any failure that pocketvlm foresees; `exit_code` is what the command line returns."""

    exit_code: int = 2


class CheckpointError(PocketVLMError):
    """A model directory is missing, damaged, or not in a format that is safe to load."""


class UnsupportedError(CheckpointError):
    """The input is sound, but this family, stage or target cannot express it."""


class RecipeError(PocketVLMError):
    """A recipe, a selection rule or a stage option is not valid."""


class CalibrationError(PocketVLMError):
    """Calibration or evaluation data is missing, empty or unreadable."""


class BundleError(PocketVLMError):
    """A bundle is damaged, was changed after it was signed, or is not a bundle."""


class InputError(PocketVLMError):
    """A picture or a prompt cannot be used: unreadable, too large, too long, or empty."""


class MissingExtraError(PocketVLMError):
    """An optional toolkit is not installed; the message names the extra that brings it."""


class ExportError(PocketVLMError):
    """A toolkit could not convert a graph; the message keeps its words and the operator."""


class HubError(PocketVLMError):
    """A hub refuses, cannot be reached, or holds something else than was looked for."""


class StorageError(PocketVLMError):
    """A file cannot be written; what was there before is still there."""


class RankError(PocketVLMError):
    """A process that shares a run has ended, or works on something else."""


class CheckFailedError(PocketVLMError):
    """Everything ran, and a bound was not met."""

    exit_code = 1


class SourceMismatchError(CheckFailedError):
    """The checkpoint is read differently here than stock transformers reads its folder."""


class ParityError(CheckFailedError):
    """The artifact does not answer like the model that was evaluated."""


class ExpectationError(CheckFailedError):
    """Size, latency or quality is beyond the bound of the recipe."""


class TooNoisyError(CheckFailedError):
    """A measurement scatters too much to tell whether a bound is met."""

    exit_code = 3


def name_some(names: Iterable[str], most: int = 3) -> str:
    """The first of many names, and how many more there are, for a one-line message."""
    known = list(names)
    shown = ", ".join(known[:most])
    return shown if len(known) <= most else f"{shown} and {len(known) - most} more"


def join_problems(problems: Sequence[str], most: int = 3) -> str:
    """One line for several problems: the first of them, and how many more there are."""
    shown = "; ".join(problems[:most])
    return shown if len(problems) <= most else f"{shown}; and {len(problems) - most} more"
