"""How a stock decoder is handed its KV cache: transformers renamed the argument in 5.24."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

__all__ = ["cache_argument"]


def cache_argument(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to a decoder or to one of its attentions.

    The signature decides, not the version: a family may follow a renaming later than others do.

    Args:
        module: A module of transformers whose `forward` takes a cache.
        cache: A transformers cache, or `None`.

    Returns:
        `{"cache": cache}`, or `{"past_key_values": cache}` before transformers 5.24.
    """
    names = inspect.signature(module.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}
