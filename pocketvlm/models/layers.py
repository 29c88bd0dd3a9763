"""Weight matrices and norms of a model, one by one: what a stage compresses and a size counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocketvlm.models.blocks import ConvBlockSpec
from pocketvlm.models.decoder import DecoderSpec
from pocketvlm.models.projector import (
    GatedStep,
    LinearStep,
    ProjectorSpec,
    ProjectorStep,
    step_linears,
)
from pocketvlm.models.tower import TowerSpec

__all__ = [
    "PARTS",
    "LinearSpec",
    "NormSpec",
    "Part",
    "decoder_linears",
    "norm_spec",
    "projector_linears",
    "table_linears",
    "tower_linears",
]

Part = Literal["tower", "projector", "decoder", "embedding", "head"]
PARTS: tuple[Part, ...] = ("tower", "projector", "decoder", "embedding", "head")


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """One weight matrix that a stage may compress.

    Attributes:
        name: The module's name in the model; its weight is `name + ".weight"`.
        part: Which part of the model it belongs to.
        role: What it does there, such as `q_proj` or `fc2`.
        block: Index of its transformer block, or `None` outside of blocks.
        out_features: Rows of the weight.
        in_features: Columns of the weight; for the embedding table, its width.
        has_bias: Whether the module adds a bias.
    """

    name: str
    part: Part
    role: str
    block: int | None
    out_features: int
    in_features: int
    has_bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return (self.out_features, self.in_features)


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """One norm that is run.

    Attributes:
        name: Its module.
        width: Channels that it scales.
        eps: What is added to the variance.
        has_bias: Whether it is a LayerNorm, with a bias, or an RMSNorm, without one.
    """

    name: str
    width: int
    eps: float
    has_bias: bool


def norm_spec(name: str, width: int, eps: float, *, has_bias: bool) -> NormSpec:
    """A norm by its name."""
    return NormSpec(name=name, width=width, eps=eps, has_bias=has_bias)


def tower_linears(tower: TowerSpec) -> tuple[LinearSpec, ...]:
    """Those of the blocks that are run, in order of execution."""
    hidden, ffn = tower.hidden_size, tower.ffn_size
    return tuple(
        _linear(
            name,
            "tower",
            index,
            shape,
            has_bias=tower.has_qkv_bias or name not in block.attention.inputs,
        )
        for index, block in enumerate(tower.blocks[: tower.feature_block + 1])
        for name, shape in (
            *((name, (hidden, hidden)) for name in (*block.attention.inputs, block.attention.o)),
            *((name, (ffn, hidden)) for name in block.ffn.inputs),
            (block.ffn.down, (hidden, ffn)),
        )
    )


def decoder_linears(decoder: DecoderSpec) -> tuple[LinearSpec, ...]:
    """Those of all blocks, in order of execution."""
    hidden, ffn = decoder.hidden_size, decoder.ffn_size
    query, key = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    linears = []
    for index, block in enumerate(decoder.blocks):
        mlp = block.ffn
        if isinstance(block, ConvBlockSpec):
            conv = block.conv
            for name in (*conv.inputs, conv.o):
                shape = (hidden, hidden)
                linears.append(_linear(name, "decoder", index, shape, has_bias=conv.has_bias))
        else:
            attention = block.attention
            shapes = {attention.q: (query, hidden), attention.k: (key, hidden)}
            shapes |= {attention.v: (key, hidden), attention.o: (hidden, query)}
            for name, shape in shapes.items():
                has_bias = decoder.has_output_bias if name == attention.o else decoder.has_qkv_bias
                linears.append(_linear(name, "decoder", index, shape, has_bias=has_bias))
        shapes = dict.fromkeys(mlp.inputs, (ffn, hidden)) | {mlp.down: (hidden, ffn)}
        for name, shape in shapes.items():
            linears.append(_linear(name, "decoder", index, shape, has_bias=decoder.has_mlp_bias))
    return tuple(linears)


def projector_linears(
    projector: ProjectorSpec, steps: tuple[ProjectorStep, ...], features: int
) -> tuple[LinearSpec, ...]:
    """Those of a projector's steps, or of a tap's, which read patches merged as the projector's.

    Args:
        projector: The projector.
        steps: The steps.
        features: Channels of a patch.
    """
    width = projector.merged_width(features)
    linears = []
    for step in steps:
        if isinstance(step, LinearStep | GatedStep):
            shape = (step.out_features, width)
            linears += [
                _linear(name, "projector", None, shape, has_bias=step.has_bias)
                for name in step_linears(step)
            ]
            width = step.out_features
    return tuple(linears)


def table_linears(decoder: DecoderSpec) -> tuple[LinearSpec, ...]:
    """The embedding table and, where it is not tied to it, the head."""
    names: tuple[tuple[str, Part], ...] = ((decoder.embedding, "embedding"),)
    if not decoder.tied_head:
        names = (*names, (decoder.head, "head"))
    shape = (decoder.vocab_size, decoder.hidden_size)
    return tuple(_linear(name, part, None, shape, has_bias=False) for name, part in names)


def _linear(
    name: str, part: Part, block: int | None, shape: tuple[int, int], *, has_bias: bool
) -> LinearSpec:
    return LinearSpec(
        name=name,
        part=part,
        role=name.rpartition(".")[2],
        block=block,
        out_features=shape[0],
        in_features=shape[1],
        has_bias=has_bias,
    )
