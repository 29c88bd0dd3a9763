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

from pocketvlm.bundle import PositionGrid, VisionVariant
from pocketvlm.errors import CheckpointError
from pocketvlm.models.blocks import BlockSpec
from pocketvlm.models.decoder import DecoderSpec
from pocketvlm.models.folds import Fold
from pocketvlm.models.images.settings import ImageSettings
from pocketvlm.models.images.tilings import Tiling
from pocketvlm.models.layers import (
    LinearSpec,
    NormSpec,
    decoder_linears,
    norm_spec,
    projector_linears,
    table_linears,
    tower_linears,
)
from pocketvlm.models.projector import (
    GatedStep,
    LinearStep,
    NormStep,
    ProjectorSpec,
    TapSpec,
    step_linears,
)
from pocketvlm.models.token_merging import TokenMerge, merge_fault
from pocketvlm.models.tower import TowerSpec

__all__ = ["ModelSpec", "ProcessorSpec"]

_LARGEST_BASE = 1e15
_POSITION_AXES = 3


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
        leaves_tiles_out: Whether tiles that show nothing are left out, so that positions of rows
            have gaps.
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
    leaves_tiles_out: bool = False
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

    def vision_variant(self, kept: int) -> VisionVariant:
        """The vision graph for pictures of this size that leaves `kept` visual tokens of a tile."""
        tower = self.tower
        return VisionVariant(
            name=f"k{kept}_{tower.width}x{tower.height}",
            height=tower.height,
            width=tower.width,
            visual_tokens=kept,
            visual_tokens_full=self.visual_tokens,
            position_grid=self.position_grid,
        )

    def with_picture_size(self, height: int, width: int) -> ModelSpec:
        """The same for pictures of another size, of which the model takes any.

        Raises:
            CheckpointError: The sizes do not fit the model.
        """
        if (self.tower.height, self.tower.width) == (height, width):
            return self
        tower = replace(self.tower, height=height, width=width)
        spec = replace(self, tower=tower)
        spec.check()
        return spec

    def sized_by(self, settings: ImageSettings) -> ModelSpec:
        """The same for the pictures that an image processor makes, of whatever size it says.

        Raises:
            CheckpointError: The sizes do not fit the model.
        """
        return self.with_picture_size(*settings.picture_size) if settings.takes_any_size else self

    def with_token_merges(self, merges: tuple[TokenMerge, ...]) -> ModelSpec:
        """The same with tokens that are merged within the tower.

        Raises:
            CheckpointError: The tower cannot merge them there.
        """
        tower, before = self.tower, self.tower.patches
        for reason, found in (
            ("attends within windows of its grid", any(b.attention.window for b in tower.blocks)),
            ("turns queries and keys by the place of a patch", tower.rope_theta is not None),
            ("hands on features of earlier blocks", tower.earlier_features or self.taps),
        ):
            if found:
                raise CheckpointError(
                    f"this tower {reason}, so that its tokens cannot be merged on the way"
                )
        blocks = [merge.block for merge in merges]
        if blocks != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] <= tower.feature_block:
            raise CheckpointError(
                f"tokens are merged in blocks {', '.join(map(str, blocks))}; allowed are ascending "
                f"ones of the blocks that are run, 0 to {tower.feature_block}"
            )
        for number, merge in enumerate(merges):
            fault = merge_fault(merge, tower.rows, tower.columns, before, is_first=number == 0)
            if fault is not None:
                raise CheckpointError(f"block {merge.block}: {fault}")
            before = merge.patches
        return replace(self, tower=replace(tower, merges=merges))

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
        projector = [name for step in steps for name in step_linears(step)]
        projector += [step.name for step in steps if isinstance(step, NormStep)]
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
            *tower_linears(self.tower),
            *projector_linears(self.projector, self.projector.steps, self.tower.feature_size),
            *(
                linear
                for tap in self.taps
                for linear in projector_linears(self.projector, tap.steps, self.tower.hidden_size)
            ),
            *table_linears(self.decoder)[:1],
            *decoder_linears(self.decoder),
            *table_linears(self.decoder)[1:],
        )

    def norms(self) -> tuple[NormSpec, ...]:
        """Every norm that is run, in order of execution."""
        tower, decoder = self.tower, self.decoder
        run = tower.blocks[: tower.feature_block + 1]
        names = [] if tower.pre_norm is None else [(tower.pre_norm, tower.hidden_size)]
        for seen in run:
            heads = (seen.attention.q_norm, seen.attention.k_norm)
            names.append((seen.attention.norm, tower.hidden_size))
            names += [(name, tower.head_dim) for name in heads if name is not None]
            names.append((seen.ffn.norm, tower.hidden_size))
        names += [] if tower.feature_norm is None else [(tower.feature_norm, tower.hidden_size)]
        norms = [
            norm_spec(name, width, tower.norm_eps, has_bias=tower.has_norm_bias)
            for name, width in names
        ]
        first = self.projector.patch_norm
        if first is not None:
            width = tower.feature_size
            norms.append(norm_spec(first.name, width, first.eps, has_bias=first.has_bias))
        projectors = [(self.projector.steps, tower.feature_size)]
        projectors += [(tap.steps, tower.hidden_size) for tap in self.taps]
        for steps, features in projectors:
            width = self.projector.merged_width(features)
            for step in steps:
                if isinstance(step, NormStep):
                    norms.append(norm_spec(step.name, width, step.eps, has_bias=step.has_bias))
                elif isinstance(step, LinearStep | GatedStep):
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
                    norms.append(norm_spec(name, width, decoder.norm_eps, has_bias=False))
        norms.append(norm_spec(decoder.norm, decoder.hidden_size, decoder.norm_eps, has_bias=False))
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
