"""Which decoders can lose whole units: those whose blocks are all of one kind."""

from __future__ import annotations

from pocketvlm.errors import RecipeError
from pocketvlm.models.spec import ModelSpec

__all__ = ["require_uniform_decoder"]


def require_uniform_decoder(spec: ModelSpec, method: str) -> None:
    """Checks that every block of the decoder has attention.

    Raises:
        RecipeError: Some have short convolutions.
    """
    decoder = spec.decoder
    if decoder.convolutions:
        raise RecipeError(
            f"{method}: {len(decoder.convolutions)} of the decoder's {decoder.depth} layers have a "
            f"short convolution instead of attention, which {method} does not support; prune and "
            "every quantizer work on such layers"
        )
