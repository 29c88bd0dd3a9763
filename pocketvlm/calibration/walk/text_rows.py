"""Where visual rows end on a walk along the decoder; see `reference_graph.decoder`.

The last sublayer that sees them is the attention of layer `visual_layers - 1`: their keys and
values are read there, and what its last linear would make of them is not.
"""

from __future__ import annotations

from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.reference_graph.decoder_rows import take_columns, text_columns

__all__ = ["ends_visual_rows", "keep_text"]


def ends_visual_rows(checkpoint: Checkpoint, block: int, kind: str) -> bool:
    """Whether visual rows end after this sublayer of this decoder block."""
    late = checkpoint.visual_layers
    return late is not None and kind == "attention" and block == late - 1


def keep_text(states: Tensor, is_visual: Tensor) -> Tensor:
    """The columns of text, [batch, text, width]; rows have their images in the same columns."""
    return take_columns(states, text_columns(is_visual))
