"""Which models can lose whole units: those whose blocks are all of one kind."""

from __future__ import annotations

from pocketvlm.errors import RecipeError
from pocketvlm.models.spec import ModelSpec

__all__ = ["require_uniform_decoder", "require_uniform_tower"]


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


def require_uniform_tower(spec: ModelSpec, method: str) -> None:
    """Checks that a tower's blocks are told apart by their number alone.

    Raises:
        RecipeError: Some attend within windows, features are taken after several, or the tower's
            config.json counts in another way.
    """
    if spec.tower.earlier_features:
        raise RecipeError(
            f"{method}: this tower's features are taken after several of its blocks, which would "
            "be others; decoder_blocks alone is possible"
        )
    if spec.tower.takes_any_size:
        raise RecipeError(
            f"{method}: a tower for pictures of any size says by number which blocks attend within "
            f"windows, and {method} cannot renumber them; decoder_blocks alone is possible"
        )
