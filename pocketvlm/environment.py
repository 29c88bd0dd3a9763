"""Sets up libraries before they are imported: no telemetry, no import-time messages.

ONNX Runtime's wheels from PyPI queue events in the user's cache folder and look up their collector
as soon as they are imported; turning it off afterwards is too late. Hugging Face's client names the
machine's libraries in every request. Both obey a variable that must be set before the import, so
the package sets it when it is imported itself: before any of its modules, and before any library
that imports ONNX Runtime behind its back. Child processes inherit it.

This runs before anything else, even before the command line can handle an interrupt, so it imports
nothing slow.
"""

from __future__ import annotations

import os
import sys

__all__ = ["REPORTING", "hush_imports", "stop_reporting"]

REPORTING = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
"""Variables that turn off what libraries send home."""

_WANTED = {"0", "false", "no", "off"}

# What libraries log while they are imported: missing GPU code, and complaints about each other.
_CHATTER = {
    "torchao": r"Failed to load \S*\.so\b",
    "torch.utils._pytree": r"is an Enum subclass and is now natively supported",
}


def stop_reporting() -> None:
    """Sets the variables, unless the user has explicitly allowed libraries to report.

    A value of 0, false, no or off, in any case, is kept; an empty one counts as unset.
    """
    for name in REPORTING:
        if os.environ.get(name, "").strip().lower() not in _WANTED:
            os.environ[name] = "1"


def hush_imports() -> None:
    """Drops the messages above from their loggers; all others still pass.

    All of these libraries import torch first, so nothing is done before torch is imported.
    """
    if "torch" in sys.modules:
        _hush_loggers()
    elif not any(isinstance(finder, _BeforeTorch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorch())


class _BeforeTorch:
    """A module finder that finds nothing, and notices when torch is imported."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        """Returns nothing, so that the other finders search."""
        if name == "torch" and self in sys.meta_path:
            sys.meta_path.remove(self)
            _hush_loggers()


def _hush_loggers() -> None:
    import logging
    import re

    class Hush(logging.Filter):
        """Lets a record pass unless its text matches."""

        def filter(self, record: logging.LogRecord) -> bool:
            return re.search(self.name, record.getMessage()) is None

    for name, pattern in _CHATTER.items():
        logger = logging.getLogger(name)
        if not any(getattr(known, "name", None) == pattern for known in logger.filters):
            logger.addFilter(Hush(pattern))
