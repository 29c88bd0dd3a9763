"""ModelSpec: where the parts of a vision-language model are, as plain data read from config.json.

Everything downstream asks the spec instead of the family: which linears exist and how wide they
are, whether the tower has a [CLS] token, which hidden state feeds the projector, how many visual
tokens an image costs. It needs neither weights nor torch, so `plan` can reason about a model that
it never loads. To add a family: one function here, one line in `_FAMILIES`, one tiny config in
the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pocketvlm.errors import CheckpointError, UnsupportedError
from pocketvlm.json_io import decode

__all__ = [
    "PARTS",
    "DecoderSpec",
    "LinearSpec",
    "ModelSpec",
    "Part",
    "ProjectorSpec",
    "TowerSpec",
    "supported_families",
]

Part = Literal["tower", "projector", "decoder", "embedding", "head"]
_LARGEST_BASE = 1e15
PARTS: tuple[Part, ...] = ("tower", "projector", "decoder", "embedding", "head")

_LONGEST_CONTEXT = 4096


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


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """A pre-norm vision transformer of the CLIP or SigLIP kind.

    Attributes:
        prefix: Module name of the tower.
        feature_block: Index of the last block that is run; its output feeds the projector.
        has_cls: Whether token 0 is a [CLS] token (dropped before the projector).
        has_pre_norm: Whether a norm stands between the embeddings and the first block.
        has_post_norm: Whether the features pass the tower's final norm.
        activation: Hugging Face's name of the FFN's activation.
    """

    prefix: str
    depth: int
    feature_block: int
    hidden_size: int
    ffn_size: int
    heads: int
    image_size: int
    patch_size: int
    channels: int
    has_cls: bool
    has_patch_bias: bool
    has_pre_norm: bool
    has_post_norm: bool
    activation: str
    norm_eps: float

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of the square image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens that one image is inside the tower: its patches, and [CLS] where there is one."""
        return self.patches_per_side**2 + int(self.has_cls)

    @property
    def blocks(self) -> str:
        """Module name of the list of blocks."""
        return f"{self.prefix}.encoder.layers"


@dataclass(frozen=True, kw_only=True)
class ProjectorSpec:
    """What turns tower features into decoder embeddings.

    Attributes:
        linears: Module names, in order of use; an activation stands between two of them.
        merge_factor: Side of the square of patches that becomes one visual token; 1 for none.
        activation: The activation between the linears, or `None`.
    """

    linears: tuple[str, ...]
    merge_factor: int
    activation: str | None
    has_bias: bool


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A Llama-shaped decoder.

    Attributes:
        prefix: Module name of the text model.
        embedding: Module name of the token embedding.
        head: Module name of the language-model head.
        tied_head: Whether the head shares the embedding's weight.
    """

    prefix: str
    embedding: str
    head: str
    depth: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    activation: str
    tied_head: bool
    has_attention_bias: bool
    has_mlp_bias: bool

    @property
    def blocks(self) -> str:
        """Module name of the list of blocks."""
        return f"{self.prefix}.layers"

    @property
    def context_length(self) -> int:
        """Positions that prompts and answers may use: those of the model, within a phone's reach.

        It is the bundle's `max_positions`, and the limit of evaluation.
        """
        return min(self.max_positions, _LONGEST_CONTEXT)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Where everything is in one vision-language model.

    Attributes:
        family: `llava` or `idefics3` (which SmolVLM is a member of).
        model_type: `model_type` of config.json.
        image_token_id: The placeholder that stands in `input_ids` once a visual token.
        image_token: The same placeholder as text.
        image_prefix: Text that the family's processor puts before an image's placeholders.
        image_suffix: Text that it puts behind them.
    """

    family: Literal["llava", "idefics3"]
    model_type: str
    tower: TowerSpec
    projector: ProjectorSpec
    decoder: DecoderSpec
    image_token_id: int
    image_token: str
    image_prefix: str
    image_suffix: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Reads a spec from the content of a config.json.

        Raises:
            UnsupportedError: The family, or an option of it, is not supported.
            CheckpointError: The config lacks a field that its family needs, or a field has a type
                or value that no model of the family can have.
        """
        model_type = config.get("model_type")
        reader = _FAMILIES.get(str(model_type))
        if reader is None:
            raise UnsupportedError(
                f"config.json: model_type {model_type!r} is not supported; "
                f"supported are {', '.join(supported_families())}"
            )
        try:
            # Through `decode`: what the reader took from anybody's JSON has the types it says.
            spec = decode(cls, asdict(reader(config)))
        except KeyError as error:
            raise CheckpointError(
                f"config.json: field {error.args[0]!r}, which {model_type} needs, is missing"
            ) from error
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"config.json: cannot be understood: {error}") from error
        spec.check()
        return spec

    def check(self) -> None:
        """Checks that the sizes fit together.

        Raises:
            CheckpointError: They do not; the message has the fields.
        """
        tower, decoder, merge = self.tower, self.decoder, self.projector.merge_factor
        wrong = [
            text
            for is_wrong, text in (
                (tower.hidden_size % tower.heads, "the tower's heads do not divide its width"),
                (tower.patch_size > tower.image_size, "a patch is larger than the picture"),
                (
                    merge > max(1, tower.patches_per_side),
                    f"{merge} x {merge} patches are merged and a picture has fewer",
                ),
                (decoder.heads % decoder.kv_heads, "KV heads do not divide the heads"),
                (decoder.head_dim % 2, "an odd head_dim cannot be rotated by position"),
                (not 0 <= self.image_token_id < 2**31, "the image token's id is out of range"),
                (not 0 < decoder.rope_theta <= _LARGEST_BASE, "rope_theta is out of range"),
                (not (0 < tower.norm_eps < 1 and 0 < decoder.norm_eps < 1), "eps is out of range"),
            )
            if is_wrong
        ]
        if wrong:
            raise CheckpointError(f"config.json: {'; '.join(wrong)}")

    @property
    def visual_tokens(self) -> int:
        """Visual tokens that one image costs before any reduction."""
        return (self.tower.patches_per_side // self.projector.merge_factor) ** 2

    def runs(self, weight: str) -> bool:
        """Whether a weight of this name takes part in any answer.

        Blocks of the tower after `feature_block` do not, nor does the norm after them where
        features are taken from within; a directory may leave them out.
        """
        tower = self.tower
        rest = weight.removeprefix(f"{tower.blocks}.")
        if rest != weight:
            return int(rest.partition(".")[0]) <= tower.feature_block
        return tower.has_post_norm or not weight.startswith(f"{tower.prefix}.post_layernorm.")

    def linears(self) -> tuple[LinearSpec, ...]:
        """Every weight matrix of the model, in order of execution.

        A tied head is not listed: it is the embedding's weight, used twice. Blocks of the tower
        behind `feature_block` are not listed either: no phone will ever run them.
        """
        return (
            *_tower_linears(self.tower),
            *_projector_linears(self),
            *_embedding_and_head(self.decoder)[:1],
            *_decoder_linears(self.decoder),
            *_embedding_and_head(self.decoder)[1:],
        )


def supported_families() -> tuple[str, ...]:
    """Values of `model_type` that can be loaded."""
    return tuple(_FAMILIES)


def _tower_linears(tower: TowerSpec) -> tuple[LinearSpec, ...]:
    hidden, ffn = tower.hidden_size, tower.ffn_size
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.out_proj": (hidden, hidden),
        "mlp.fc1": (ffn, hidden),
        "mlp.fc2": (hidden, ffn),
    }
    return tuple(
        LinearSpec(
            name=f"{tower.blocks}.{block}.{path}",
            part="tower",
            role=path.rpartition(".")[2],
            block=block,
            out_features=rows,
            in_features=columns,
            has_bias=True,
        )
        for block in range(tower.feature_block + 1)
        for path, (rows, columns) in shapes.items()
    )


def _projector_linears(spec: ModelSpec) -> tuple[LinearSpec, ...]:
    width = spec.tower.hidden_size * spec.projector.merge_factor**2
    linears = []
    for name in spec.projector.linears:
        linears.append(
            LinearSpec(
                name=name,
                part="projector",
                role=name.rpartition(".")[2],
                block=None,
                out_features=spec.decoder.hidden_size,
                in_features=width,
                has_bias=spec.projector.has_bias,
            )
        )
        width = spec.decoder.hidden_size
    return tuple(linears)


def _decoder_linears(decoder: DecoderSpec) -> tuple[LinearSpec, ...]:
    hidden, ffn = decoder.hidden_size, decoder.ffn_size
    query, key = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    attention, mlp = decoder.has_attention_bias, decoder.has_mlp_bias
    shapes = {
        "self_attn.q_proj": (query, hidden, attention),
        "self_attn.k_proj": (key, hidden, attention),
        "self_attn.v_proj": (key, hidden, attention),
        "self_attn.o_proj": (hidden, query, attention),
        "mlp.gate_proj": (ffn, hidden, mlp),
        "mlp.up_proj": (ffn, hidden, mlp),
        "mlp.down_proj": (hidden, ffn, mlp),
    }
    return tuple(
        LinearSpec(
            name=f"{decoder.blocks}.{block}.{path}",
            part="decoder",
            role=path.rpartition(".")[2],
            block=block,
            out_features=rows,
            in_features=columns,
            has_bias=has_bias,
        )
        for block in range(decoder.depth)
        for path, (rows, columns, has_bias) in shapes.items()
    )


def _embedding_and_head(decoder: DecoderSpec) -> tuple[LinearSpec, ...]:
    names: tuple[tuple[str, Part], ...] = ((decoder.embedding, "embedding"),)
    if not decoder.tied_head:
        names = (*names, (decoder.head, "head"))
    return tuple(
        LinearSpec(
            name=name,
            part=part,
            role=name.rpartition(".")[2],
            block=None,
            out_features=decoder.vocab_size,
            in_features=decoder.hidden_size,
            has_bias=False,
        )
        for name, part in names
    )


def _read_decoder(config: Mapping[str, Any], prefix: str) -> DecoderSpec:
    text = config["text_config"]
    supported = ("llama",)
    if text.get("model_type") not in supported:
        raise UnsupportedError(
            f"config.json: text_config.model_type {text.get('model_type')!r} is not supported; "
            f"supported are {', '.join(supported)}"
        )
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedError(
            f"config.json: text_config rope_type {rope['rope_type']!r} is not supported; "
            "supported is 'default'"
        )
    # transformers 4 wrote the base beside the scaling, transformers 5 writes it inside.
    theta = rope.get("rope_theta", text.get("rope_theta", 10_000.0))
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    return DecoderSpec(
        prefix=prefix,
        embedding=f"{prefix}.embed_tokens",
        head="lm_head",
        depth=text["num_hidden_layers"],
        hidden_size=hidden,
        ffn_size=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        vocab_size=text["vocab_size"],
        max_positions=text.get("max_position_embeddings", 2048),
        rope_theta=float(theta),
        norm_eps=text.get("rms_norm_eps", 1e-6),
        activation=text.get("hidden_act", "silu"),
        tied_head=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        has_attention_bias=bool(text.get("attention_bias", False)),
        has_mlp_bias=bool(text.get("mlp_bias", False)),
    )


def _read_tower(
    vision: Mapping[str, Any], prefix: str, *, feature_block: int, is_clip: bool
) -> TowerSpec:
    """CLIP has [CLS], a norm before its blocks and features from within; SigLIP has neither."""
    return TowerSpec(
        prefix=prefix,
        depth=vision["num_hidden_layers"],
        feature_block=feature_block,
        hidden_size=vision["hidden_size"],
        ffn_size=vision["intermediate_size"],
        heads=vision["num_attention_heads"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        channels=vision.get("num_channels", 3),
        has_cls=is_clip,
        has_patch_bias=not is_clip,
        has_pre_norm=is_clip,
        has_post_norm=not is_clip,
        activation=vision.get("hidden_act", "quick_gelu" if is_clip else "gelu_pytorch_tanh"),
        norm_eps=vision.get("layer_norm_eps", 1e-5 if is_clip else 1e-6),
    )


def _read_llava(config: Mapping[str, Any]) -> ModelSpec:
    vision = config["vision_config"]
    if vision.get("model_type") != "clip_vision_model":
        raise UnsupportedError(
            f"config.json: vision_config.model_type {vision.get('model_type')!r} is not supported "
            "for llava; supported is 'clip_vision_model'"
        )
    layer = config.get("vision_feature_layer", -2)
    strategy = config.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int) or strategy != "default":
        raise UnsupportedError(
            f"config.json: vision_feature_layer {layer!r} with strategy {strategy!r} is not "
            "supported; supported is one layer with strategy 'default'"
        )
    depth = vision["num_hidden_layers"]
    # hidden_states[0] is what enters the first block, so state i leaves block i - 1.
    state = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= state <= depth:
        raise UnsupportedError(
            f"config.json: vision_feature_layer {layer} lies outside a tower of {depth} blocks"
        )
    return ModelSpec(
        family="llava",
        model_type=config["model_type"],
        tower=_read_tower(vision, "model.vision_tower", feature_block=state - 1, is_clip=True),
        projector=ProjectorSpec(
            linears=(
                "model.multi_modal_projector.linear_1",
                "model.multi_modal_projector.linear_2",
            ),
            merge_factor=1,
            activation=config.get("projector_hidden_act", "gelu"),
            has_bias=config.get("multimodal_projector_bias", True),
        ),
        decoder=_read_decoder(config, "model.language_model"),
        image_token_id=config["image_token_id"]
        if "image_token_id" in config
        else config["image_token_index"],
        image_token="<image>",  # noqa: S106  (a token of text, not a secret)
        image_prefix="",
        image_suffix="",
    )


def _read_idefics3(config: Mapping[str, Any]) -> ModelSpec:
    vision = config["vision_config"]
    boundary = "<fake_token_around_image>"
    return ModelSpec(
        family="idefics3",
        model_type=config["model_type"],
        tower=_read_tower(
            vision,
            "model.vision_model",
            feature_block=vision["num_hidden_layers"] - 1,
            is_clip=False,
        ),
        projector=ProjectorSpec(
            linears=("model.connector.modality_projection.proj",),
            merge_factor=config["scale_factor"],
            activation=None,
            has_bias=False,
        ),
        decoder=_read_decoder(config, "model.text_model"),
        image_token_id=config["image_token_id"],
        image_token="<image>",  # noqa: S106  (a token of text, not a secret)
        image_prefix=f"{boundary}<global-img>",
        image_suffix=boundary,
    )


_FAMILIES = {"llava": _read_llava, "idefics3": _read_idefics3, "smolvlm": _read_idefics3}
