"""The reference models and the scenes that they were trained on.

`pocket-llava` and `pocket-smol` are small but real vision-language models in stock transformers
classes. They ship inside the package: tests, the demo and every quality figure work offline.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["REFERENCE_MODELS", "reference_model_path"]

REFERENCE_MODELS: tuple[str, ...] = ("pocket-llava", "pocket-smol")


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
