"""What libraries find in this process before they are imported: report to nobody, and keep quiet.

ONNX Runtime's wheels from PyPI keep a queue of events in the user's cache folder and look up their
collector from the moment they are imported; asking it to stop afterwards is too late. Hugging
Face's client names the machine's libraries in every request. Both heed a variable that must be set
before the import, so the package sets it when it is imported itself: before any module of its own,
and before any library that imports ONNX Runtime behind its back. Child processes inherit it.
"""

from __future__ import annotations

import logging
import os
import re

__all__ = ["REPORTING", "hush_imports", "stop_reporting"]

REPORTING = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
"""Variables that turn off what libraries send home."""

_WANTED = {"0", "false", "no", "off"}

# What libraries log while they are imported: of GPU code they lack, and of each other's habits.
_CHATTER = {
    "torchao": re.compile(r"Failed to load \S*\.so\b"),
    "torch.utils._pytree": re.compile(r"is an Enum subclass and is now natively supported"),
}


def stop_reporting() -> None:
    """Sets the variables, but where their user has plainly chosen that libraries may report.

    A value of 0, false, no or off stays, in any spelling; an empty one counts as none.
    """
    for name in REPORTING:
        if os.environ.get(name, "").strip().lower() not in _WANTED:
            os.environ[name] = "1"


def hush_imports() -> None:
    """Drops the messages above from their loggers; whatever else those say is heard."""
    for name, pattern in _CHATTER.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Hush) for known in logger.filters):
            logger.addFilter(_Hush(pattern))


class _Hush(logging.Filter):
    """Lets a record pass unless its text matches."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self._pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        return self._pattern.search(record.getMessage()) is None
