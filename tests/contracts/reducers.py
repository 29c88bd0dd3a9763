"""One of every kind of reducer, for the suites that hold all of them to their contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketvlm.compress.tokens.reducer import Reducer
from pocketvlm.compress.tokens.stage import REDUCERS

REQUIRED: Mapping[str, Mapping[str, Any]] = {
    "imported": {"name": "examples.local_contrast:LocalContrast"}
}
"""Options without a default; the documented example is held to what the package's own are."""


def make_reducer(name: str) -> Reducer:
    return REDUCERS[name](**REQUIRED.get(name, {}))
