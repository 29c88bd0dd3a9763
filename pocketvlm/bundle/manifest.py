"""The manifest of a bundle, as types: everything a runtime must know to answer from the folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pocketvlm.bundle.positions import PositionGrid
from pocketvlm.bundle.tile_budget import TileBudget
from pocketvlm.bundle.variants import MOST_VARIANTS, VisionVariant
from pocketvlm.bundle.visual_schedule import VisualSchedule
from pocketvlm.errors import BundleError
from pocketvlm.json_io import DecodeError, decode

__all__ = [
    "BUNDLE_SCHEMA",
    "CacheLayout",
    "Component",
    "Generation",
    "Manifest",
    "MutualRows",
    "PromptLayout",
    "Role",
    "RuntimeNeeds",
    "TensorSignature",
]

BUNDLE_SCHEMA = 1
Role = Literal["vision", "embedding", "decoder", "prefill", "unpack"]
"""What a graph does; `prefill` and `unpack` are beside a decoder that could do without them."""
MutualRows = Literal["tile", "prompt"]
"""Rows of a prompt that see each other, the later ones too: a tile's, or all of them."""
_MAX_CACHE_ROW = 2**24
_MAX_POSITIONS = 2**24
_CACHE_BYTES = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class TensorSignature:
    """One input or output of a graph; a string in `shape` names a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Component:
    """One graph of one target.

    Attributes:
        target: `onnx`, `executorch` or `coreml`.
        role: `vision`, `embedding` or `decoder`; `prefill` fills the decoder's cache, with
            weights that `unpack` makes of the decoder's.
        file: Path of the graph inside the bundle.
        precision: How its weights are stored, by part, such as `{"decoder": "int4 g32"}`.
        function: Its function in the file, if the file holds several that share weights.
        variant: Which of `Manifest.variants` a vision graph is; `None` where there is one alone.
        least_rows: Rows of a call from which a `prefill` graph runs all of them but the last.
        states: Tensors that the runtime keeps from call to call, such as the decoder's cache.
        notes: Warnings of the toolkit that converted the graph, and what costs time or accuracy.
    """

    target: str
    role: Role
    file: str
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    precision: Mapping[str, str] = field(default_factory=dict)
    function: str | None = None
    variant: str | None = None
    least_rows: int | None = None
    states: tuple[TensorSignature, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.role == "prefill") != (self.least_rows is not None):
            raise ValueError("least_rows is what a prefill graph has, and no other one")
        if self.least_rows is not None and self.least_rows < 2:  # noqa: PLR2004  (one is the last)
            raise ValueError(f"least_rows is {self.least_rows}; it must be at least 2")


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """How a picture is written in a prompt.

    Attributes:
        image_token: The placeholder, as text.
        image_token_id: The placeholder, as a token.
        image_prefix: Text before the placeholders of a picture.
        image_suffix: Text after them.
        tile_marker: Text before those of a tile, with `{row}` and `{column}`; `None` where every
            picture is one tile.
        whole_marker: Text before those of the whole picture after its tiles, where prefix and
            suffix enclose all of them; `None` where they are the whole picture's alone.
        image_mark: What the chat template writes for a picture; `None` for the placeholder itself.
        is_prefix: Whether `bos_token` stands after the last picture and a line break ends the
            prompt.
        line_break: File with the row, little-endian float32, that stands after each line of a
            picture whose tiles make up one map; `None` where tile follows tile.
        embedding_rows: Rows of the embedding table; every other token id must be smaller. `None` if
            unknown.
    """

    image_token: str
    image_token_id: int
    image_prefix: str = ""
    image_suffix: str = ""
    tile_marker: str | None = None
    whole_marker: str | None = None
    image_mark: str | None = None
    is_prefix: bool = False
    line_break: str | None = None
    embedding_rows: int | None = None

    def __post_init__(self) -> None:
        if not self.image_token or self.image_token_id < 0:
            raise ValueError("image_token must not be empty, and image_token_id must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How answer tokens are chosen, and what ends an answer.

    Attributes:
        eos_token_ids: Tokens that end it.
        max_positions: Positions of a whole conversation.
        settings: What else decides the next token (`generation_settings`), if it is not simply the
            likeliest.
    """

    eos_token_ids: tuple[int, ...]
    max_positions: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.max_positions <= _MAX_POSITIONS:
            raise ValueError(f"max_positions must be 1 to {_MAX_POSITIONS:,}")


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """The decoder's key-value cache.

    Attributes:
        layers: Layers that have one.
        kv_heads: Key-value heads per layer.
        head_dim: Width of a head.
        dtype: Type of its elements.
        visual_schedule: How many visual rows its layers hold; `None` where all hold all.
        mutual_rows: Rows that see each other and so enter in one call; `None` where every row sees
            the past alone.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: Literal["float32", "float16", "int8"]
    visual_schedule: VisualSchedule | None = None
    mutual_rows: MutualRows | None = None

    def __post_init__(self) -> None:
        sizes = (self.layers, self.kv_heads, self.head_dim)
        if min(sizes) < 1 or self.layers * self.kv_heads * self.head_dim > _MAX_CACHE_ROW:
            raise ValueError(
                f"layers, kv_heads and head_dim are {sizes}; each must be at least 1, their "
                f"product at most {_MAX_CACHE_ROW:,}"
            )
        if self.visual_schedule is not None:
            self.visual_schedule.require_depth(self.layers)

    def stored_bytes(self, text_rows: int, visual_rows: int) -> int:
        """Bytes of this many rows, where all visual ones entered the decoder in one call."""
        schedule = self.visual_schedule
        rows = self.layers * text_rows
        rows += (
            self.layers * visual_rows
            if schedule is None
            else sum(schedule.rows_by_layer(self.layers, visual_rows))
        )
        return 2 * self.kv_heads * self.head_dim * _CACHE_BYTES[self.dtype] * rows


@dataclass(frozen=True, kw_only=True)
class RuntimeNeeds:
    """What the files of a target require of the runtime that opens them.

    Attributes:
        runtime: Its name; `iOS` for Core ML, whose runtime is the system.
        lowest_version: The lowest version that reads the files correctly.
        formats: Versions of the formats in which they are written, by name.
        operators: Operators beyond the standard ones, by domain and name.
    """

    runtime: str
    lowest_version: str
    formats: Mapping[str, int] = field(default_factory=dict)
    operators: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d{1,6}(\.\d{1,6}){0,3}", self.lowest_version):
            raise ValueError("lowest_version must be numbers separated by dots")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a runtime must know to answer from the bundle.

    Attributes:
        model: Name of the source model.
        family: Family of the model specification.
        source_sha256: Digest of the source checkpoint's weights.
        recipe_sha256: Digest of the resolved recipe.
        visual_tokens: Embeddings that the vision graph returns for one tile, k; a picture is one
            tile where `prompt` has no marker of tiles.
        visual_tokens_full: Positions that one tile takes when `positions` is `original`, N.
        positions: `original` or `consecutive`; see `models.reducer.TokenReducer`.
        position_grid: The N tokens of a picture, where positions have three axes; `None` where
            they have one.
        variants: The vision graphs where there are several; what is said above is the first's.
        tile_budget: Which of them sees which tile of a picture, unless an app names one; `None`
            where one sees all.
        prompt: How a picture is written in a prompt.
        generation: How answers are generated.
        kv_cache: The decoder's cache.
        components: The graphs.
        files: sha256 of every file of the bundle except the manifest, the report and the card.
        toolchain: Versions that produced the bundle.
        runtimes: What each target requires of the runtime that opens it.
    """

    model: str
    family: str
    source_sha256: str
    recipe_sha256: str
    visual_tokens: int
    visual_tokens_full: int
    positions: Literal["original", "consecutive"]
    prompt: PromptLayout
    generation: Generation
    kv_cache: CacheLayout
    components: tuple[Component, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    toolchain: Mapping[str, str | None] = field(default_factory=dict)
    runtimes: Mapping[str, RuntimeNeeds] = field(default_factory=dict)
    position_grid: PositionGrid | None = None
    variants: tuple[VisionVariant, ...] = ()
    tile_budget: TileBudget | None = None
    schema: int = BUNDLE_SCHEMA

    def __post_init__(self) -> None:
        if not 1 <= self.visual_tokens <= self.visual_tokens_full <= _MAX_POSITIONS:
            raise ValueError(
                f"visual_tokens are {self.visual_tokens} of {self.visual_tokens_full}; both must "
                "be at least 1, and the first no more than the second"
            )
        if self.position_grid is not None:
            if self.position_grid.tokens != self.visual_tokens_full:
                raise ValueError("position_grid must have visual_tokens_full tokens")
            if self.positions != "original":
                raise ValueError("positions must be original where there is a position_grid")
        self._check_variants()
        if self.tile_budget is not None:
            own = {variant.visual_tokens for variant in self.variants}
            missing = [count for count in self.tile_budget.counts if count not in own]
            if missing:
                raise ValueError(
                    f"tile_budget gives a tile {', '.join(map(str, missing))} visual tokens, and "
                    "no vision graph returns as many"
                )

    def _check_variants(self) -> None:
        names = [variant.name for variant in self.variants]
        if len(names) > MOST_VARIANTS:
            raise ValueError(f"variants are {len(names)}; allowed are {MOST_VARIANTS}")
        if len(set(names)) < len(names):
            raise ValueError(f"variants must have names that differ, not {', '.join(names)}")
        if not names:
            return
        first = self.variants[0]
        if (first.visual_tokens, first.visual_tokens_full, first.position_grid) != (
            self.visual_tokens,
            self.visual_tokens_full,
            self.position_grid,
        ):
            raise ValueError(f"{first.name}, the first of variants, must be what is said above it")
        for target in {component.target for component in self.components}:
            of_target = [each for each in self.components if each.target == target]
            held = [each.variant for each in of_target if each.role == "vision"]
            if held != names:
                raise ValueError(
                    f"{target} has the vision graphs {', '.join(map(str, held)) or 'none'}, and "
                    f"variants are {', '.join(names)}"
                )

    @property
    def position_axes(self) -> int:
        """Axes along which rows are numbered."""
        return 1 if self.position_grid is None else 3

    @property
    def tile_tokens(self) -> tuple[int, int | None]:
        """Tokens of a tile, on average at most, and of the whole picture, `None` for as many."""
        budget = self.tile_budget
        return (self.visual_tokens, None) if budget is None else (budget.tile, budget.whole)

    def variant_of(self, visual_tokens: int) -> VisionVariant:
        """The first of `variants` that returns this number of tokens; there must be one."""
        return next(each for each in self.variants if each.visual_tokens == visual_tokens)

    def has(self, target: str, role: Role) -> bool:
        """Whether a target has a graph of a role."""
        return any((each.target, each.role) == (target, role) for each in self.components)

    def only(self, variant: VisionVariant) -> Manifest:
        """The manifest as if one of its `variants` were the only vision graph."""
        return replace(
            self,
            visual_tokens=variant.visual_tokens,
            visual_tokens_full=variant.visual_tokens_full,
            position_grid=variant.position_grid,
            variants=(variant,),
            tile_budget=None,
            components=tuple(
                each
                for each in self.components
                if each.role != "vision" or each.variant == variant.name
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values; later additions are left out if they are empty."""
        document = asdict(self)
        for name in ("tile_marker", "whole_marker", "image_mark", "is_prefix", "line_break"):
            if document["prompt"][name] in (None, False):
                del document["prompt"][name]
        for name in ("position_grid", "tile_budget"):
            if document[name] is None:
                del document[name]
        for name in ("visual_schedule", "mutual_rows"):
            if document["kv_cache"][name] is None:
                del document["kv_cache"][name]
        for name in ("runtimes", "variants"):
            if not document[name]:
                del document[name]
        for component in document["components"]:
            for name in ("variant", "least_rows"):
                if component[name] is None:
                    del component[name]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: Path) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
            BundleError: A field is missing, unknown or of the wrong type, or the schema is of
                another version.
        """
        if document.get("schema") != BUNDLE_SCHEMA:
            raise BundleError(
                f"{where}: bundle schema {document.get('schema')!r}; this version reads "
                f"{BUNDLE_SCHEMA}"
            )
        try:
            return decode(cls, document)
        except DecodeError as error:
            raise BundleError(f"{where}: not a manifest of a bundle: {error}") from error
