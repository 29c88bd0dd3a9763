"""What libraries find in this process before they are imported: report to nobody, and keep quiet.

ONNX Runtime's wheels from PyPI keep a queue of events in the user's cache folder and look up their
collector from the moment they are imported; asking it to stop afterwards is too late. Hugging
Face's client names the machine's libraries in every request. Both heed a variable that must be set
before the import, so the package sets it when it is imported itself: before any module of its own,
and before any library that imports ONNX Runtime behind its back. Child processes inherit it.

This runs before anything else, also before the command line can answer an interrupt: it imports
nothing that takes time.
"""

from __future__ import annotations

import os
import sys

__all__ = ["REPORTING", "hush_imports", "stop_reporting"]

REPORTING = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
"""Variables that turn off what libraries send home."""

_WANTED = {"0", "false", "no", "off"}

# What libraries log while they are imported: of GPU code they lack, and of each other's habits.
_CHATTER = {
    "torchao": r"Failed to load \S*\.so\b",
    "torch.utils._pytree": r"is an Enum subclass and is now natively supported",
}


def stop_reporting() -> None:
    """Sets the variables, but where their user has plainly chosen that libraries may report.

    A value of 0, false, no or off stays, in any spelling; an empty one counts as none.
    """
    for name in REPORTING:
        if os.environ.get(name, "").strip().lower() not in _WANTED:
            os.environ[name] = "1"


def hush_imports() -> None:
    """Drops the messages above from their loggers; whatever else those say is heard.

    All of these libraries import torch first, so nothing is done before somebody does.
    """
    if "torch" in sys.modules:
        _hush_loggers()
    elif not any(isinstance(finder, _BeforeTorch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorch())


class _BeforeTorch:
    """A finder of modules that finds none, and notices when torch is looked for."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        """Leaves the search to the others."""
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
