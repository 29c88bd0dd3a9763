"""ModelSpec: where the parts of a vision-language model are, as plain data read from config.json.

Everything downstream asks the spec instead of the family: which linears exist, what they are named
and how wide they are, whether the tower has a [CLS] token, which hidden state feeds the projector,
how many visual tokens an image costs. It needs neither weights nor torch, so `plan` can reason
about a model that it never loads. A family is one reader in `models/families`, which alone knows
how transformers names modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pocketvlm.bundle import PositionGrid
from pocketvlm.errors import CheckpointError
from pocketvlm.models.folds import Fold
from pocketvlm.models.images.tilings import Tiling
from pocketvlm.models.projector import (
    LinearStep,
    NormStep,
    ProjectorSpec,
    ProjectorStep,
    TapSpec,
)

__all__ = [
    "PARTS",
    "AttentionSpec",
    "BlockSpec",
    "ConvBlockSpec",
    "DecoderBlock",
    "DecoderSpec",
    "FfnSpec",
    "LinearSpec",
    "ModelSpec",
    "NormSpec",
    "Part",
    "ProcessorSpec",
    "RopeSpec",
    "ShortConvSpec",
    "SlidingSpec",
    "TowerSpec",
]

Part = Literal["tower", "projector", "decoder", "embedding", "head"]
_LARGEST_BASE = 1e15
PARTS: tuple[Part, ...] = ("tower", "projector", "decoder", "embedding", "head")

_LONGEST_CONTEXT = 4096
_POSITION_AXES = 3


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


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The attention of a block, by the names of its modules: x + attention(norm(x)).

    Attributes:
        module: The whole.
        norm: What is applied to the hidden state first.
        q: The linear that makes queries.
        k: Keys.
        v: Values.
        o: What projects the heads back to the hidden state.
        q_norm: The RMSNorm of each head of the queries, before they are rotated; `None` for none.
        k_norm: Likewise of the keys.
        window: Side, in patches, of the squares within which a tower's tokens attend to each other;
            `None` where they attend to all.
        post_norm: What is applied to what the sublayer returns, before the sum; `None` for nothing.
        is_sliding: Whether a row sees no further back than `DecoderSpec.sliding` says.
    """

    module: str
    norm: str
    q: str
    k: str
    v: str
    o: str
    q_norm: str | None = None
    k_norm: str | None = None
    window: int | None = None
    post_norm: str | None = None
    is_sliding: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Linears that read the norm's output."""
        return (self.q, self.k, self.v)

    @property
    def output(self) -> str:
        """The linear that ends the sublayer."""
        return self.o


@dataclass(frozen=True, kw_only=True)
class FfnSpec:
    """The feed-forward network of a block, by the names of its modules: x + ffn(norm(x)).

    Attributes:
        module: The whole.
        norm: What is applied to the hidden state first.
        gate: The linear whose activation multiplies `up`, or `None` where `up` itself is activated.
        up: The linear that widens.
        down: The linear that narrows again.
        post_norm: What is applied to what the sublayer returns, before the sum; `None` for nothing.
    """

    module: str
    norm: str
    gate: str | None
    up: str
    down: str
    post_norm: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Linears that read the norm's output."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def output(self) -> str:
        """The linear that ends the sublayer."""
        return self.down


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One transformer block, by the names of its modules.

    Attributes:
        module: The block.
        attention: Its first sublayer.
        ffn: Its second.
    """

    module: str
    attention: AttentionSpec
    ffn: FfnSpec

    @property
    def mixer(self) -> AttentionSpec:
        """The sublayer in which rows see each other."""
        return self.attention


@dataclass(frozen=True, kw_only=True)
class ShortConvSpec:
    """A gated short convolution (LFM2, arXiv 2511.23404), by the names of its modules.

    It makes C * conv(B * x), each channel convolved along the rows. What it keeps of the past is a
    state, the last `taps - 1` rows of B * x.

    Attributes:
        module: The whole.
        norm: What is applied to the hidden state first.
        b: The linear that makes the gate before the convolution.
        c: The gate after it.
        x: What is convolved.
        kernel: The convolution, weight [width, 1, taps].
        taps: Rows that it sees: the current one and those before it.
        o: The linear that ends the sublayer.
        has_bias: Whether linears and convolution have biases.
    """

    module: str
    norm: str
    b: str
    c: str
    x: str
    kernel: str
    taps: int
    o: str
    has_bias: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        """Linears that read the norm's output."""
        return (self.b, self.c, self.x)

    @property
    def output(self) -> str:
        """The linear that ends the sublayer."""
        return self.o


@dataclass(frozen=True, kw_only=True)
class ConvBlockSpec:
    """A decoder block that has a short convolution instead of attention.

    Attributes:
        module: The block.
        conv: Its first sublayer.
        ffn: Its second.
    """

    module: str
    conv: ShortConvSpec
    ffn: FfnSpec

    @property
    def mixer(self) -> ShortConvSpec:
        """The sublayer in which rows see each other."""
        return self.conv


DecoderBlock = BlockSpec | ConvBlockSpec
"""A block of a decoder; those of a tower have attention."""


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """A pre-norm vision transformer.

    Attributes:
        prefix: Module name of the tower.
        embeddings: Module name of what turns pixels into tokens.
        patch_embedding: Module name of the convolution in it.
        class_embedding: Name of the parameter in it that is the [CLS] token.
        position_embedding: Module name of its table of positions, where there is one.
        pre_norm: Module name of the norm before the first block, where there is one.
        post_norm: Module name of the norm after the last block, where there is one.
        stack: Module name of the list of blocks.
        blocks: All of them, also those that are never run.
        feature_block: Index of the last block that is run; its output feeds the projector.
        earlier_features: Blocks before it whose outputs feed the projector as well: they stand
            before its own, channels after channels.
        height: Pixels of a picture from top to bottom.
        width: Pixels of a picture from left to right.
        has_post_norm: Whether the features pass `post_norm`.
        activation: Hugging Face's name of the FFN's activation.
        has_qkv_bias: Whether queries, keys and values have biases; every other linear has one.
        has_norm_bias: Whether norms are LayerNorms or, without a bias, RMSNorms.
        table_side: Positions along one side of the square that the table holds, which is resampled
            to the picture; `None` where it has one for each token.
        rope_theta: Base of the frequencies by which queries and keys turn: one half of the pairs of
            channels by a patch's row, the other by its column; `None` where they do not.
    """

    prefix: str
    embeddings: str
    patch_embedding: str
    class_embedding: str | None
    position_embedding: str | None
    pre_norm: str | None
    post_norm: str | None
    stack: str
    blocks: tuple[BlockSpec, ...]
    feature_block: int
    hidden_size: int
    ffn_size: int
    heads: int
    height: int
    width: int
    patch_size: int
    channels: int
    has_patch_bias: bool
    has_post_norm: bool
    activation: str
    norm_eps: float
    has_qkv_bias: bool = True
    has_norm_bias: bool = True
    table_side: int | None = None
    rope_theta: float | None = None
    earlier_features: tuple[int, ...] = ()

    @property
    def feature_size(self) -> int:
        """Channels of the features of one patch."""
        return self.hidden_size * (1 + len(self.earlier_features))

    @property
    def depth(self) -> int:
        """Blocks, also those that are never run."""
        return len(self.blocks)

    @property
    def feature_norm(self) -> str | None:
        """Module name of the norm that features pass, where they pass one."""
        return self.post_norm if self.has_post_norm else None

    @property
    def takes_any_size(self) -> bool:
        """Whether the model takes pictures of any size, so that this one was chosen for it."""
        return self.rope_theta is not None

    @property
    def has_cls(self) -> bool:
        """Whether token 0 is a [CLS] token, which is dropped before the projector."""
        return self.class_embedding is not None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    @property
    def rows(self) -> int:
        """Patches from top to bottom."""
        return self.height // self.patch_size

    @property
    def columns(self) -> int:
        """Patches from left to right."""
        return self.width // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Tokens that one image is inside the tower: its patches, and [CLS] where there is one."""
        return self.patches + int(self.has_cls)


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary positions of a decoder (RoFormer, arXiv 2104.09864).

    Attributes:
        theta: The base of the frequencies.
        width: Channels of a head that are rotated.
        sections: Pairs of channels that turn by the position in time, by that in height and by that
            in width (M-RoPE, arXiv 2409.12191, section 2.1); empty where positions have one axis.
        is_interleaved: Whether sections alternate pair by pair, and time takes what the other two
            leave, or lie one after another.
        factor: What positions are divided by (2306.15595).
    """

    theta: float
    width: int
    sections: tuple[int, ...] = ()
    is_interleaved: bool = False
    factor: float = 1.0

    @property
    def axes(self) -> int:
        """Numbers that a position consists of."""
        return max(1, len(self.sections))

    @property
    def pair_axes(self) -> tuple[int, ...]:
        """Which of them turns each pair of channels."""
        if not self.sections:
            return (0,) * (self.width // 2)
        if not self.is_interleaved:
            return tuple(axis for axis, pairs in enumerate(self.sections) for _ in range(pairs))
        axes = [0] * (self.width // 2)
        for axis, pairs in enumerate(self.sections):
            if axis > 0:
                last = min(len(axes), self.axes * pairs)
                axes[axis : last : self.axes] = [axis] * len(range(axis, last, self.axes))
        return tuple(axes)


@dataclass(frozen=True, kw_only=True)
class SlidingSpec:
    """Attention to the near past alone (Longformer, arXiv 2004.05150).

    Attributes:
        window: Rows that a row sees, itself included.
        rope: Positions of the layers that have it.
    """

    window: int
    rope: RopeSpec


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A pre-norm decoder with rotary positions and grouped queries.

    Attributes:
        prefix: Module name of the text model.
        embedding: Module name of the token embedding.
        stack: Module name of the list of blocks.
        blocks: All of them.
        norm: Module name of the norm after the last block.
        head: Module name of the language-model head.
        tied_head: Whether the head shares the embedding's weight.
        has_qkv_bias: Whether queries, keys and values have biases.
        has_output_bias: Whether the attention's last linear has one.
        has_mlp_bias: Whether the FFN's linears have.
        sliding: How blocks attend that do not see the whole past; `None` where all see it.
        mutual_rows: Rows that see each other, the later ones too: those of a picture's tile, or
            the whole prompt; `None` where every row sees the past alone.
        embed_scale: What rows of the token embedding are multiplied by.
        score_softcap: Bound c of attention scores s, as c tanh(s / c); `None` for none.
        logit_softcap: Likewise of the logits.
    """

    prefix: str
    embedding: str
    stack: str
    blocks: tuple[DecoderBlock, ...]
    norm: str
    head: str
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope: RopeSpec
    norm_eps: float
    activation: str
    tied_head: bool
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    sliding: SlidingSpec | None = None
    mutual_rows: Literal["tile", "prompt"] | None = None
    embed_scale: float = 1.0
    score_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def depth(self) -> int:
        """Blocks."""
        return len(self.blocks)

    @property
    def attention_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that have attention, and with it a cache of keys and values."""
        return tuple(i for i, block in enumerate(self.blocks) if isinstance(block, BlockSpec))

    def attention(self, block: int) -> AttentionSpec:
        """The attention of a block that has it.

        Raises:
            ValueError: It has none.
        """
        found = self.blocks[block]
        if not isinstance(found, BlockSpec):
            raise ValueError(f"{found.module} has no attention")  # noqa: TRY004  (a block's kind)
        return found.attention

    @property
    def convolutions(self) -> dict[int, ShortConvSpec]:
        """Short convolutions by the indices of their blocks."""
        return {
            i: block.conv for i, block in enumerate(self.blocks) if not isinstance(block, BlockSpec)
        }

    @property
    def context_length(self) -> int:
        """Positions that prompts and answers may use: those of the model, within a phone's reach.

        It is the bundle's `max_positions`, and the limit of evaluation.
        """
        return min(self.max_positions, _LONGEST_CONTEXT)

    def sliding_of(self, block: int) -> SlidingSpec | None:
        """How a block attends that does not see the whole past; `None` for one that does."""
        found = self.blocks[block]
        is_sliding = isinstance(found, BlockSpec) and found.attention.is_sliding
        return self.sliding if is_sliding else None

    def rope_of(self, block: int) -> RopeSpec:
        """Rotary positions of a block."""
        sliding = self.sliding_of(block)
        return self.rope if sliding is None else sliding.rope

    @property
    def has_masks(self) -> bool:
        """Whether some row sees others than all of the past."""
        return self.mutual_rows is not None or self.sliding is not None


@dataclass(frozen=True, kw_only=True)
class ProcessorSpec:
    """What a family's stock processor is and does.

    Attributes:
        classes: Classes that may process for the family; the first where a folder names none.
        counts_patches: Whether the stock processor counts a picture's placeholders from the
            patches of a side, or takes a setting's number of them.
        stand_in: A stock class that writes the same prompts, for where the first cannot be loaded
            without packages that a picture does not need, such as those of its video part; it may
            be that class itself, made without that part. `None` where there is none.
        named_tokens: Tokens of a picture's text, as this package spells them, that a tokenizer may
            spell otherwise, by the name that its settings give them. The placeholder's name is
            `image_token`, unless it is among them.
        count_setting: The setting that states the placeholders of a picture, in the processor's
            file or the image processor's; `None` where stock counts them from a picture's size.
        default_count: What the setting is where no file states it; `None` where stock then fails.
        added_words: Words that the processor adds to its tokenizer.
        adds_ends: Whether the tokenizer may put its own tokens before and after a prompt.
    """

    classes: tuple[str, ...]
    counts_patches: bool
    stand_in: str | None = None
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    count_setting: str | None = "image_seq_len"
    default_count: int | None = 169
    added_words: tuple[str, ...] = ()
    adds_ends: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Where everything is in one vision-language model.

    Attributes:
        family: The family's name in `models.families.FAMILIES`.
        processor: The family's stock processor.
        model_type: `model_type` of config.json.
        image_token_id: The placeholder that stands in `input_ids` once a visual token.
        image_token: The same placeholder as text.
        image_prefix: Text that the family's processor puts before an image's placeholders.
        image_suffix: Text that it puts after them.
        tile_marker: Text that it puts before those of a tile (`prompt.picture_text`), or `None`
            where it never cuts pictures.
        whole_marker: Text that it puts before those of the whole picture after its tiles, or
            `None` where that has the text of a picture that is not cut.
        image_mark: What chat templates write for a picture; `None` for the placeholder itself.
        has_prefix_prompt: Whether its processor puts the tokenizer's first token after the last
            picture, and a line break after the prompt.
        chat_template: The template of folders that have none; `None` where each must have one.
        tiling: How its processor cuts large pictures into tiles; `None` where each is one, and
            where no processor has been read.
        line_break: Name of the parameter that is the row after each line of a picture whose tiles
            make up one map; `None` where tile follows tile.
        folds: How tensors of a stock checkpoint become those that are named here.
        taps: Blocks of the tower that add rows to the decoder, by the block that they are added
            after.
    """

    family: str
    processor: ProcessorSpec
    model_type: str
    tower: TowerSpec
    projector: ProjectorSpec
    decoder: DecoderSpec
    image_token_id: int
    image_token: str
    image_prefix: str
    image_suffix: str
    tile_marker: str | None = None
    whole_marker: str | None = None
    image_mark: str | None = None
    has_prefix_prompt: bool = False
    chat_template: str | None = None
    tiling: Tiling | None = None
    line_break: str | None = None
    folds: tuple[Fold, ...] = ()
    taps: tuple[TapSpec, ...] = ()

    @property
    def row_width(self) -> int:
        """Channels of a row that enters the decoder: an embedding, then what each tap adds."""
        return self.decoder.hidden_size * (1 + len(self.taps))

    def check(self) -> None:
        """Checks that the sizes fit together.

        Raises:
            CheckpointError: They do not; the message has the fields.
        """
        tower, decoder, merge = self.tower, self.decoder, self.projector.merge_factor
        taps = {conv.taps for conv in decoder.convolutions.values()}
        wrong = [
            text
            for is_wrong, text in (
                (tower.hidden_size % tower.heads, "the tower's heads do not divide its width"),
                (
                    tower.patch_size > min(tower.height, tower.width),
                    "a patch is larger than the picture",
                ),
                (
                    merge > max(1, min(tower.rows, tower.columns)),
                    f"{merge} x {merge} patches are merged and a picture has fewer",
                ),
                (
                    not isinstance(self.projector.steps[-1], LinearStep),
                    "the projector does not end with a linear layer",
                ),
                (
                    len(self.taps) >= decoder.depth
                    or any(not 0 <= tap.block < tower.feature_block for tap in self.taps),
                    "blocks of the tower add rows after blocks that there are not",
                ),
                (not decoder.attention_blocks, "no layer of the decoder has attention"),
                (
                    len(taps) > 1 or any(count < 2 for count in taps),  # noqa: PLR2004  (no state)
                    "short convolutions do not all see the same 2 rows or more",
                ),
                (decoder.heads % decoder.kv_heads, "KV heads do not divide the heads"),
                (decoder.rope.width % 2, "an odd head_dim cannot be rotated by position"),
                (not 0 <= self.image_token_id < 2**31, "the image token's id is out of range"),
                (not 0 < decoder.rope.theta <= _LARGEST_BASE, "rope_theta is out of range"),
                (
                    decoder.rope.sections
                    and (
                        len(decoder.rope.sections) != _POSITION_AXES
                        or min(decoder.rope.sections) < 0
                        or sum(decoder.rope.sections) != decoder.rope.width // 2
                    ),
                    "mrope_section does not share the pairs of a head among three axes",
                ),
                *_picture_faults(tower, merge),
                (not (0 < tower.norm_eps < 1 and 0 < decoder.norm_eps < 1), "eps is out of range"),
            )
            if is_wrong
        ]
        if wrong:
            raise CheckpointError(f"config.json: {'; '.join(wrong)}")

    @property
    def position_grid(self) -> PositionGrid | None:
        """A picture's tokens where positions have three axes; `None` where they have one."""
        if self.decoder.rope.axes == 1:
            return None
        return PositionGrid(rows=self.visual_rows, columns=self.visual_columns)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens that one image costs before any reduction."""
        return self.visual_rows * self.visual_columns

    @property
    def visual_rows(self) -> int:
        """Visual tokens of an image from top to bottom."""
        return self.tower.rows // self.projector.merge_factor

    @property
    def visual_columns(self) -> int:
        """Visual tokens of an image from left to right."""
        return self.tower.columns // self.projector.merge_factor

    def with_picture_size(self, height: int, width: int) -> ModelSpec:
        """The same for pictures of another size, of which the model takes any.

        Raises:
            CheckpointError: The sizes do not fit the model.
        """
        tower = replace(self.tower, height=height, width=width)
        spec = replace(self, tower=tower)
        spec.check()
        return spec

    def runs(self, weight: str) -> bool:
        """Whether a weight of this name takes part in any answer.

        Blocks of the tower after `feature_block` do not, nor does the norm after them where
        features are taken from within, nor a head that pools; a directory may leave them out.
        """
        tower = self.tower
        rest = weight.removeprefix(f"{tower.stack}.")
        if rest != weight:
            return int(rest.partition(".")[0]) <= tower.feature_block
        steps = (*self.projector.steps, *(step for tap in self.taps for step in tap.steps))
        projector = [step.name for step in steps if isinstance(step, LinearStep | NormStep)]
        if not weight.startswith(f"{tower.prefix}.") or weight.startswith(
            tuple(f"{name}." for name in projector)
        ):
            return True
        parts = (tower.embeddings, tower.pre_norm, tower.feature_norm)
        return any(part is not None and weight.startswith(f"{part}.") for part in parts)

    def linears(self) -> tuple[LinearSpec, ...]:
        """Every weight matrix of the model, in order of execution.

        A tied head is not listed: it is the embedding's weight, used twice. Blocks of the tower
        after `feature_block` are not listed either: no phone will ever run them.
        """
        return (
            *_tower_linears(self.tower),
            *_projector_linears(self, self.projector.steps, self.tower.feature_size),
            *(
                linear
                for tap in self.taps
                for linear in _projector_linears(self, tap.steps, self.tower.hidden_size)
            ),
            *_embedding_and_head(self.decoder)[:1],
            *_decoder_linears(self.decoder),
            *_embedding_and_head(self.decoder)[1:],
        )

    def norms(self) -> tuple[NormSpec, ...]:
        """Every norm that is run, in order of execution."""
        tower, decoder = self.tower, self.decoder
        run = tower.blocks[: tower.feature_block + 1]
        names = [] if tower.pre_norm is None else [tower.pre_norm]
        names += [half.norm for block in run for half in (block.attention, block.ffn)]
        names += [] if tower.feature_norm is None else [tower.feature_norm]
        has_bias = tower.has_norm_bias
        norms = [
            _norm(name, tower.hidden_size, tower.norm_eps, has_bias=has_bias) for name in names
        ]
        projectors = [(self.projector.steps, tower.feature_size)]
        projectors += [(tap.steps, tower.hidden_size) for tap in self.taps]
        for steps, features in projectors:
            width = self.projector.merged_width(features)
            for step in steps:
                if isinstance(step, NormStep):
                    norms.append(_norm(step.name, width, step.eps, has_bias=step.has_bias))
                elif isinstance(step, LinearStep):
                    width = step.out_features
        for block in decoder.blocks:
            per_head = (
                (
                    (block.attention.q_norm, decoder.head_dim),
                    (block.attention.k_norm, decoder.head_dim),
                    (block.attention.post_norm, decoder.hidden_size),
                )
                if isinstance(block, BlockSpec)
                else ()
            )
            for name, width in (
                (block.mixer.norm, decoder.hidden_size),
                *per_head,
                (block.ffn.norm, decoder.hidden_size),
                (block.ffn.post_norm, decoder.hidden_size),
            ):
                if name is not None:
                    norms.append(_norm(name, width, decoder.norm_eps, has_bias=False))
        norms.append(_norm(decoder.norm, decoder.hidden_size, decoder.norm_eps, has_bias=False))
        return tuple(norms)


def _picture_faults(tower: TowerSpec, merge: int) -> Iterator[tuple[bool, str]]:
    """What is wrong with the size of pictures, where the tower takes any."""
    if not tower.takes_any_size:
        return
    picture, cell = f"a picture of {tower.width} x {tower.height} pixels", tower.patch_size * merge
    yield (
        bool(tower.height % cell or tower.width % cell),
        f"{picture} is not whole cells of {cell} x {cell}, which become a visual token each",
    )
    yield tower.head_dim % 4 != 0, "a tower's head cannot be rotated by rows and columns"
    sides = {block.attention.window for block in tower.blocks} - {None}
    for side in sorted(side for side in sides if side is not None):
        pixels = side * tower.patch_size
        yield (
            side < 1 or bool(tower.rows % side or tower.columns % side),
            f"{picture} is not whole windows of {pixels} x {pixels}, within which tokens attend to "
            f"each other",
        )


def _norm(name: str, width: int, eps: float, *, has_bias: bool) -> NormSpec:
    return NormSpec(name=name, width=width, eps=eps, has_bias=has_bias)


def _tower_linears(tower: TowerSpec) -> tuple[LinearSpec, ...]:
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


def _decoder_linears(decoder: DecoderSpec) -> tuple[LinearSpec, ...]:
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


def _projector_linears(
    spec: ModelSpec, steps: tuple[ProjectorStep, ...], features: int
) -> tuple[LinearSpec, ...]:
    width = spec.projector.merged_width(features)
    linears = []
    for step in steps:
        if isinstance(step, LinearStep):
            shape = (step.out_features, width)
            linears.append(_linear(step.name, "projector", None, shape, has_bias=step.has_bias))
            width = step.out_features
    return tuple(linears)


def _embedding_and_head(decoder: DecoderSpec) -> tuple[LinearSpec, ...]:
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
