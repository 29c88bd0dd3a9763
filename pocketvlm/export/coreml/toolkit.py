"""coremltools: whether it is there, and what it says while it works."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pocketvlm.errors import MissingExtraError

__all__ = ["INSTALL", "has_coremltools", "listen"]

INSTALL = "the coreml target needs coremltools: pip install 'pocketvlm[coreml]'"

# A toolkit's use of other libraries is not a remark on the model.
_ABOUT_CODE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def has_coremltools() -> bool:
    """Whether the toolkit is installed; does not import it."""
    from importlib.util import find_spec

    return find_spec("coremltools") is not None


@contextmanager
def listen() -> Iterator[list[str]]:
    """Collects what the toolkit says, in order and without repetition, instead of printing it.

    Raises:
        MissingExtraError: coremltools is not installed.
    """
    if not has_coremltools():
        raise MissingExtraError(INSTALL)
    _import_quietly()
    said: list[str] = []
    logger = logging.getLogger("coremltools")
    handlers, level, spreads = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [_Collector(said)], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said.extend(
            str(warning.message)
            for warning in caught
            if not issubclass(warning.category, _ABOUT_CODE)
        )
        said[:] = dict.fromkeys(" ".join(line.split()) for line in said)
    finally:
        logger.handlers, logger.propagate = handlers, spreads
        logger.setLevel(level)


def _import_quietly() -> None:
    """What the toolkit says of this machine when it is imported is not about the model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import coremltools  # noqa: F401  (imported for its effects)
    finally:
        logging.disable(before)


class _Collector(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())
