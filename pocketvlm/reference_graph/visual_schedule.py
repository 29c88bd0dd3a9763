"""Visual rows that leave the decoder: which are kept, and what is left of a call.

The definition of `bundle.VisualSchedule`. What ranks is the attention of one row to all before it,
computed once more from queries and keys of one layer, so that no fused attention has to give up
its weights. FastV's published code reads them from a layer that it runs without a fused kernel,
and PyramidDrop's from queries and keys of the next layer, as here; both take one row of scores for
each group of heads of one key, which fails where several heads share one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.reference_graph.decoder_rows import DecoderRows, take_columns, text_columns
from pocketvlm.reference_graph.sublayers import Sublayer, run_sublayers
from pocketvlm.reference_graph.torch_ops import TorchOps

__all__ = ["BlockRows", "DroppedRows", "RowsLeft", "drop_rows", "reader_attention"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RowsLeft:
    """The rows of a call that a layer runs.

    Attributes:
        rows: What attention takes beside their hidden state.
        columns: int64 [batch, length], ascending: where they stood when they entered the decoder.
        is_visual: bool [batch, length]: which came from an image.
        is_filler: bool [batch, length]: which have been dropped, and stay behind all others so that
            prompts with unequal rows share a batch; no other row sees them.
        reader: int64 [batch]: the row that ranks, the last of the prompt.
        entered: Visual rows of each prompt that entered the decoder.
    """

    rows: DecoderRows
    columns: Tensor
    is_visual: Tensor
    is_filler: Tensor
    reader: Tensor
    entered: tuple[int, ...]

    @classmethod
    def of(cls, rows: DecoderRows, is_visual: Tensor, reader: Tensor | None = None) -> RowsLeft:
        """All rows of a call.

        Args:
            rows: What attention takes beside them.
            is_visual: bool [batch, length].
            reader: int64 [batch]; `None` for the last row.
        """
        batch, length = is_visual.shape
        last = torch.full((batch,), length - 1, device=is_visual.device)
        return cls(
            rows=rows,
            columns=torch.arange(length, device=is_visual.device).expand(batch, -1),
            is_visual=is_visual,
            is_filler=torch.zeros_like(is_visual),
            reader=last if reader is None else reader,
            entered=tuple(is_visual.sum(dim=1).tolist()),
        )

    @property
    def is_kept(self) -> Tensor:
        """Which rows are there for their own sake, bool [batch, length]."""
        return ~self.is_filler


@dataclass(frozen=True, kw_only=True, eq=False)
class DroppedRows:
    """What a drop leaves of a call.

    Attributes:
        columns: int64 [batch, left]: which of the rows before it are left.
        left: What they are.
    """

    columns: Tensor
    left: RowsLeft

    def of(self, states: Tensor) -> Tensor:
        """The rows that are left, of states [batch, length, width]."""
        return take_columns(states, self.columns)

    def is_left(self, length: int) -> Tensor:
        """Which of the rows before are left, bool [batch, length]."""
        flags = self.left.is_filler.new_zeros(len(self.columns), length)
        return flags.scatter(1, self.columns, self.left.is_kept)


@torch.no_grad()
def drop_rows(
    checkpoint: Checkpoint, block: int, hidden: Tensor, left: RowsLeft, *, after_attention: bool
) -> DroppedRows | None:
    """The drop before or after the attention of a block; `None` where there is none.

    Args:
        checkpoint: The model with its schedule.
        block: The block.
        hidden: What enters the block, [batch, length, width].
        left: What these rows are.
        after_attention: Whether rows are asked about that end after the block's attention.
    """
    schedule = checkpoint.visual_schedule
    drop = None if schedule is None else schedule.drop_in(block, after_attention=after_attention)
    if schedule is None or drop is None:
        return None
    is_kept = ~left.is_visual & left.is_kept
    if schedule.drops[drop].keep:
        scores = reader_attention(checkpoint, block, hidden, left)
        order = scores.masked_fill(~left.is_visual, -1.0).argsort(
            dim=1, descending=True, stable=True
        )
        kept = [schedule.kept(drop + 1, count) for count in left.entered]
        counts = torch.tensor(kept, device=hidden.device)
        is_kept |= left.is_visual & (order.argsort(dim=1) < counts[:, None])
    columns = text_columns(~is_kept)
    is_filler = ~is_kept.gather(1, columns)
    rows = left.rows.take(columns)
    if schedule.positions == "consecutive":
        rows = rows.numbered_from(rows.held(schedule.drops[drop].layers))
    return DroppedRows(
        columns=columns,
        left=replace(
            left,
            rows=rows,
            columns=left.columns.gather(1, columns),
            is_visual=(left.is_visual & is_kept).gather(1, columns),
            is_filler=is_filler,
            reader=((columns < left.reader[:, None]) & ~is_filler).sum(dim=1),
        ),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockRows:
    """The rows of a batch that one block runs.

    Attributes:
        before: What is dropped before its attention; `None` for nothing.
        attention: What its attention runs.
        after: What is dropped after its attention; `None` for nothing.
    """

    before: DroppedRows | None
    attention: RowsLeft
    after: DroppedRows | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, block: int, hidden: Tensor, left: RowsLeft) -> BlockRows:
        """What a block makes of rows that enter it."""
        before = drop_rows(checkpoint, block, hidden, left, after_attention=False)
        if before is not None:
            hidden, left = before.of(hidden), before.left
        after = drop_rows(checkpoint, block, hidden, left, after_attention=True)
        return cls(before=before, attention=left, after=after)

    @property
    def ffn(self) -> RowsLeft:
        """What its feed-forward network runs, and the next block is given."""
        return self.attention if self.after is None else self.after.left

    def entering(self, hidden: Tensor) -> Tensor:
        """The rows that its attention runs, of those that enter the block."""
        return hidden if self.before is None else self.before.of(hidden)

    def between(self, hidden: Tensor) -> Tensor:
        """The rows that its feed-forward network runs, of those that its attention returns."""
        return hidden if self.after is None else self.after.of(hidden)

    def run(self, sublayers: tuple[Sublayer, Sublayer], hidden: Tensor) -> Tensor:
        """The hidden state after the block; autograd may record it."""
        return run_sublayers(
            sublayers,
            self.attention.rows,
            hidden,
            before=self.entering,
            between=self.between,
        )


def reader_attention(checkpoint: Checkpoint, block: int, hidden: Tensor, left: RowsLeft) -> Tensor:
    """What the row that ranks pays to each row of the call, mean over heads, [batch, length].

    Each head's softmax is over all that this row sees, rows of earlier calls included.

    Args:
        checkpoint: The model.
        block: The layer whose attention it is.
        hidden: What enters it, [batch, length, width].
        left: What these rows are.
    """
    decoder, (batch, length) = checkpoint.spec.decoder, hidden.shape[:2]
    ops = TorchOps(checkpoint.model, checkpoint.spec, context=left.rows)
    names = decoder.attention(block).inputs
    normed = ops.norm(hidden, decoder.attention(block).norm)
    queries, keys, _ = ops.decoder_heads(ops.linear(normed, *names), block, *names)
    place = left.reader[:, None, None, None].expand(-1, decoder.heads, 1, decoder.head_dim)
    query = queries.gather(2, place).view(batch, decoder.kv_heads, -1, decoder.head_dim)
    past = left.rows.past_keys(block)
    if past is not None:
        keys = torch.cat([past, keys], dim=2)
    held = keys.shape[2] - length
    scores = (query @ keys.transpose(-1, -2)) * decoder.head_dim**-0.5
    hides = torch.arange(-held, length, device=hidden.device)[None] > left.reader[:, None]
    weights = scores.masked_fill(hides[:, None, None], float("-inf")).softmax(dim=-1)
    return weights.mean(dim=(1, 2))[:, held:]
