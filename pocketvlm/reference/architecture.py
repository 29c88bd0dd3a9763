"""The architectures: what is fixed before any weight is trained.

All put an 8x8 grid of visual tokens per tile before the same decoder, so it is pretrained once.
Every linear dimension is a multiple of 32, which suits group-wise int4 and Core ML.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from pocketvlm.reference.scenes import CANVAS, PATCH_GRID
from pocketvlm.reference.tokenizer import (
    BOS_ID,
    DIALECTS,
    EOS_ID,
    IMAGE_ID,
    PAD_ID,
    VOCABULARY_SIZE,
    build_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = [
    "MAX_POSITIONS",
    "VISUAL_TOKENS",
    "build_model",
    "build_processor",
    "decoder_config",
    "generation_config",
    "pixel_statistics",
]

VISUAL_TOKENS = PATCH_GRID**2
MAX_POSITIONS = 1024
_PATCH = CANVAS // PATCH_GRID


def decoder_config(vocabulary: int = VOCABULARY_SIZE) -> LlamaConfig:
    """The text decoder that all models have: 2.5 M parameters."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def build_model(name: str) -> PreTrainedModel:
    """Builds a reference model with fresh random weights in float32."""
    if name == "pocket-llava":
        return _build_llava()
    if name in ("pocket-smol", "pocket-tiles"):
        return _build_smol(DIALECTS[name].vocabulary_size)
    raise ValueError(
        f"no reference architecture is called {name!r}; there are {', '.join(DIALECTS)}"
    )


def _build_llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=5,  # the fifth only refines CLS: features are the fourth's
        num_attention_heads=4,
        image_size=CANVAS,
        patch_size=_PATCH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=decoder_config(),
        image_token_index=IMAGE_ID,
        image_seq_length=VISUAL_TOKENS,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def _build_smol(vocabulary: int) -> PreTrainedModel:
    vision = SmolVLMVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=CANVAS,
        patch_size=_PATCH // 2,  # pixel shuffle folds 2x2 patches into one visual token
    )
    config = SmolVLMConfig(
        vision_config=vision,
        text_config=decoder_config(vocabulary),
        image_token_id=IMAGE_ID,
        scale_factor=2,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
    )
    return SmolVLMForConditionalGeneration(config)


def build_processor(name: str) -> ProcessorMixin:
    """Builds the processor of a reference model: Pillow only, no torchvision."""
    tokenizer = build_tokenizer(name)
    template = DIALECTS[name].chat_template
    if name == "pocket-llava":
        return LlavaProcessor(
            image_processor=CLIPImageProcessorPil(
                size={"shortest_edge": CANVAS}, crop_size={"height": CANVAS, "width": CANVAS}
            ),
            tokenizer=tokenizer,
            patch_size=_PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,  # CLS, which "default" then drops
            chat_template=template,
        )
    return Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": CANVAS * (2 if name == "pocket-tiles" else 1)},
            max_image_size={"longest_edge": CANVAS},
            do_image_splitting=name == "pocket-tiles",
        ),
        tokenizer=tokenizer,
        image_seq_len=VISUAL_TOKENS,
        chat_template=template,
    )


def generation_config() -> GenerationConfig:
    """Greedy decoding of a short answer."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=8,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def pixel_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which a model's image processor normalises."""
    processor = build_processor(name).image_processor
    return tuple(processor.image_mean), tuple(processor.image_std)
