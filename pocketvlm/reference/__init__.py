"""The reference models and the scenes that they were trained on.

`pocket-llava`, `pocket-smol` and `pocket-tiles` are small but real vision-language models in stock
transformers classes. They ship inside the package: tests, the demo and every quality figure work
offline.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

__all__ = ["REFERENCE_MODELS", "Pictures", "reference_model_path"]

Pictures = Literal["reference", "mosaics"]
"""Generated pictures: scenes of the size that a tower takes, or several scenes in one."""

REFERENCE_MODELS: Mapping[str, Pictures] = {
    "pocket-llava": "reference",
    "pocket-smol": "reference",
    "pocket-tiles": "mosaics",
}
"""The pictures that each model was trained on, by its name."""


def reference_model_path(name: str) -> Path:
    """Returns the folder of a shipped reference model.

    Args:
        name: One of ``REFERENCE_MODELS``.

    Raises:
        ValueError: If there is no model of that name.
    """
    if name not in REFERENCE_MODELS:
        known = ", ".join(REFERENCE_MODELS)
        raise ValueError(f"no reference model is called {name!r}; there are: {known}")
    return Path(__file__).parent / "models" / name
