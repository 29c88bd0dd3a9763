"""Random models at published shapes: honest for speed and size, worthless for quality.

Dense speed and file size do not depend on the values of the weights, so seeded random weights at
the shape of a real model measure what the real one would. The same writer makes the tiny models
of the tests.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from pocketvlm.checkpoint.config import read_spec
from pocketvlm.files.publish import replace_directory
from pocketvlm.models.folds import AddOne
from pocketvlm.models.images.tilings.anyres import Anyres
from pocketvlm.models.spec import ModelSpec
from pocketvlm.reference.shapes import Shape

__all__ = [
    "tiny_config",
    "write_random_model",
    "write_shape",
    "write_tiny_model",
]

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_IMAGE = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
_FRAME = ("<|vision_start|>", "<|vision_end|>")
_CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for line in message['content'] %}{% if line['type'] == 'image' %}<image>"
    "{% else %} {{ line['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


TINY_MODELS = (
    "llava",
    "llava-interleave",
    "llava-next",
    "granite-vision",
    "llava-onevision",
    "smolvlm",
    "smolvlm-tiles",
    "idefics3",
    "internvl3",
    "internvl3.5",
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "glm-ocr",
    "paddleocr-vl",
    "lfm2-vl",
    "lfm2-vl-tiles",
    "paligemma",
    "paligemma2",
    "gemma3",
)
"""Names of tiny configurations: one for every way of building that a reader knows."""

_SEEDS = {
    "granite-vision": 2,
    "llava-onevision": 3,
    "smolvlm-tiles": 4,
    "paligemma": 1,
    "gemma3": 1,
}
"""Of weights with which answers vary; those of others do with seed 0."""


def tiny_config(name: str) -> dict[str, Any]:
    """A config of a few ten thousand parameters, for tests, by its name in `TINY_MODELS`."""
    text = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    if name == "llava-interleave":
        del text["head_dim"]
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": 259,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": True,
            "text_config": {**text, "model_type": "qwen2", "tie_word_embeddings": True},
            # As in the 384 of patches of 14: the last pixels of a side make no whole patch.
            "vision_config": {**vision, "model_type": "siglip_vision_model", "image_size": 34},
        }
    if name == "llava":
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": 259,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": True,
            "text_config": {**text, "tie_word_embeddings": True},
            "vision_config": {**vision, "model_type": "clip_vision_model", "projection_dim": 64},
        }
    if name in ("llava-next", "granite-vision"):
        decoder = {**text, "model_type": "mistral", "sliding_window": None}
        tower = {**vision, "model_type": "clip_vision_model", "projection_dim": 64}
        if name == "granite-vision":
            del text["head_dim"]
            decoder = {**text, "model_type": "granite", "tie_word_embeddings": True}
            decoder |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}
            decoder |= {"attention_multiplier": 0.5, "logits_scaling": 8.0}
            tower = {**vision, "model_type": "siglip_vision_model", "num_hidden_layers": 4}
        is_granite = name == "granite-vision"
        return {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            "image_token_index": 259,
            "vision_feature_layer": [-4, -2, -1] if is_granite else -2,
            "vision_feature_select_strategy": "full" if is_granite else "default",
            "projector_hidden_act": "gelu",
            "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]],
            "tie_word_embeddings": is_granite,
            "text_config": decoder,
            "vision_config": tower,
        }
    if name == "llava-onevision":
        del text["head_dim"]
        return {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "model_type": "llava_onevision",
            "image_token_index": 259,
            "video_token_index": 260,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "projector_hidden_act": "gelu",
            # The last one makes a map that is made smaller.
            "image_grid_pinpoints": [[32, 32], [32, 64], [64, 32], [64, 64], [160, 160]],
            "vision_aspect_ratio": "anyres_max_9",
            "tie_word_embeddings": True,
            "text_config": {**text, "model_type": "qwen2", "tie_word_embeddings": True},
            "vision_config": {**vision, "model_type": "siglip_vision_model"},
        }
    if name == "idefics3":
        return {
            "architectures": ["Idefics3ForConditionalGeneration"],
            "model_type": "idefics3",
            "image_token_id": 259,
            "scale_factor": 2,
            "tie_word_embeddings": True,
            "text_config": {**text, "tie_word_embeddings": True},
            "vision_config": {**vision, "model_type": "idefics3_vision", "image_size": 64},
        }
    if name in ("smolvlm", "smolvlm-tiles"):
        return {
            "architectures": ["SmolVLMForConditionalGeneration"],
            "model_type": "smolvlm",
            "image_token_id": 259,
            "scale_factor": 2,
            "tie_word_embeddings": False,
            "text_config": text,
            "vision_config": {**vision, "model_type": "smolvlm_vision", "image_size": 64},
        }
    if name in ("internvl3", "internvl3.5"):
        is_newer = name == "internvl3.5"
        return {
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": "internvl",
            "image_token_id": 259,
            "downsample_ratio": 0.5,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
            "text_config": {
                **text,
                "model_type": "qwen3" if is_newer else "qwen2",
                "head_dim": 32 if is_newer else 16,
                "tie_word_embeddings": False,
            },
            "vision_config": {
                **vision,
                "model_type": "internvl_vision",
                "image_size": [32, 32],
                "patch_size": [8, 8],
                "num_channels": 3,
                "attention_bias": not is_newer,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-6,
                "norm_type": "layer_norm",
                "use_qk_norm": False,
                "use_mask_token": False,
                "use_absolute_position_embeddings": True,
                "use_mean_pooling": not is_newer,
            },
        }
    if name in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl"):
        return _qwen_config(name, text)
    if name == "glm-ocr":
        return _glm_config(text)
    if name == "paddleocr-vl":
        return _paddleocr_config(text)
    if name in ("lfm2-vl", "lfm2-vl-tiles"):
        del text["rms_norm_eps"], text["head_dim"]
        layers = ["conv", "full_attention", "conv", "conv"]
        return {
            "architectures": ["Lfm2VlForConditionalGeneration"],
            "model_type": "lfm2_vl",
            "image_token_id": 259,
            "projector_hidden_size": 96,
            "projector_use_layernorm": name == "lfm2-vl",
            "downsample_factor": 2,
            "tie_word_embeddings": True,
            "text_config": {
                **text,
                "model_type": "lfm2",
                "num_hidden_layers": len(layers),
                "layer_types": layers,
                "intermediate_size": 130,  # of which the class makes 96
                "block_multiple_of": 32,
                "conv_bias": name == "lfm2-vl-tiles",
                "conv_L_cache": 4 if name == "lfm2-vl-tiles" else 3,
                "tie_word_embeddings": True,
            },
            "vision_config": {
                **{key: value for key, value in vision.items() if key != "image_size"},
                "model_type": "siglip2_vision_model",
                "num_patches": 16,
                "vision_use_head": False,
            },
        }
    siglip = {**vision, "model_type": "siglip_vision_model"}
    if name == "paligemma":
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "image_token_index": 259,
            "projection_dim": 64,
            "text_config": {**text, "model_type": "gemma", "num_key_value_heads": 1},
            "vision_config": siglip,
        }
    if name == "paligemma2":
        gemma2 = {"query_pre_attn_scalar": 16, "sliding_window": 8} | {
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 1.0,
        }
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "image_token_index": 259,
            "projection_dim": 64,
            "text_config": {**text, "model_type": "gemma2", **gemma2},
            "vision_config": siglip,
        }
    if name == "gemma3":
        local, whole = "sliding_attention", "full_attention"
        ropes = {
            local: {"rope_type": "default", "rope_theta": 10000.0},
            whole: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        }
        gemma3 = {"query_pre_attn_scalar": 16, "sliding_window": 6, "rope_parameters": ropes}
        return {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "image_token_index": 259,
            "eoi_token_index": 260,
            "boi_token_index": 261,
            "mm_tokens_per_image": 4,
            "text_config": {
                **text,
                **gemma3,
                "model_type": "gemma3_text",
                "num_hidden_layers": 3,
                "layer_types": [local, whole, local],
            },
            "vision_config": siglip,
        }
    raise ValueError(f"{name!r} is not a tiny model; there are {', '.join(TINY_MODELS)}")


def _qwen_config(name: str, text: dict[str, Any]) -> dict[str, Any]:
    """A config of the Qwen-VL kind; its tiny pictures are 64 x 32 pixels."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    if name == "qwen3-vl":
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    else:
        del text["head_dim"]
    vision: dict[str, Any] = {
        "depth": 3,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if name == "qwen2-vl":
        kind, label = "qwen2_vl", "Qwen2VL"
        vision |= {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
    elif name == "qwen3-vl":
        kind, label = "qwen3_vl", "Qwen3VL"
        text["num_hidden_layers"] = 3
        vision |= {
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": 64,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 1],
        }
    else:
        kind, label = "qwen2_5_vl", "Qwen2_5_VL"
        vision |= {
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": 64,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        }
    return {
        "architectures": [f"{label}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_id": 259,
        "video_token_id": 260,
        "vision_start_token_id": 261,
        "vision_end_token_id": 262,
        "tie_word_embeddings": True,
        "text_config": {**text, "model_type": f"{kind}_text", "rope_parameters": rope},
        "vision_config": {**vision, "model_type": f"{kind}_vision"},
    }


def _glm_config(text: dict[str, Any]) -> dict[str, Any]:
    """A config of GLM-OCR, with heads that are wider together than the hidden state."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    decoder = {"head_dim": 32, "rope_parameters": {**rope, "mrope_section": [4, 6, 6]}}
    return {
        "architectures": ["GlmOcrForConditionalGeneration"],
        "model_type": "glm_ocr",
        "image_token_id": 259,
        "video_token_id": 260,
        "tie_word_embeddings": False,
        "text_config": {**text, **decoder, "model_type": "glm_ocr_text"},
        "vision_config": {
            "model_type": "glm_ocr_vision",
            "depth": 2,
            "hidden_size": 48,
            "intermediate_size": 72,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
        },
    }


def _paddleocr_config(text: dict[str, Any]) -> dict[str, Any]:
    """A config of PaddleOCR-VL, with biases and a table of positions of another ratio."""
    rope = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [2, 3, 3]}
    return {
        "architectures": ["PaddleOCRVLForConditionalGeneration"],
        "model_type": "paddleocr_vl",
        "image_token_id": 259,
        "video_token_id": 260,
        "vision_start_token_id": 261,
        "vision_end_token_id": 262,
        "tie_word_embeddings": True,
        "text_config": {
            **text,
            "model_type": "paddleocr_vl_text",
            "rope_parameters": rope,
            "use_bias": True,
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "paddleocr_vl_vision",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 40,
            "patch_size": 8,
            "spatial_merge_size": 2,
        },
    }


def write_shape(shape: Shape, path: Path, *, seed: int = 0, is_split: bool = True) -> Path:
    """Writes a random model at a published shape, unless it is there already.

    Args:
        shape: The shape.
        path: The directory.
        seed: Seed of the weights.
        is_split: Whether its processor cuts pictures as the published one does, or as little as it
            can.
    """
    processor = {**shape.processor, "image_processor": {**shape.processor["image_processor"]}}
    tiling = shape.spec.tiling
    if tiling is not None and not is_split:
        processor["image_processor"].update(tiling.limited(1).settings)
    texts = {
        "processor_config.json": json.dumps(processor, indent=2) + "\n",
        "config.json": json.dumps(shape.config, indent=2) + "\n",
    }
    if all(_holds(path / file, text) for file, text in texts.items()):
        return path
    has_markers = shape.spec.tile_marker is not None
    tiles = tiling.most_edge if tiling is not None and has_markers else 1
    with replace_directory(path) as folder:
        write_random_model(dict(shape.config), folder, seed=seed, tiles_per_edge=tiles)
        (folder / "preprocessor_config.json").unlink()
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
    return path


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text


def write_tiny_model(name: str, path: Path) -> None:
    """Writes a tiny model of `TINY_MODELS`, with the processor that belongs to it."""
    tiles = 3 if name.endswith("-tiles") else 1
    write_random_model(tiny_config(name), path, seed=_SEEDS.get(name, 0), tiles_per_edge=tiles)


def write_random_model(
    config: dict[str, Any], path: Path, *, seed: int = 0, tiles_per_edge: int = 1
) -> None:
    """Writes a Hugging Face directory with seeded random bf16 weights.

    Args:
        config: Content of its config.json.
        path: The directory; config.json is written last, so that a half-written directory is not a
            model.
        seed: Seed of the weights.
        tiles_per_edge: Tiles along a picture's longest edge, where its processor splits pictures.
    """
    spec = read_spec(config)
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    centred = {fold.target for fold in spec.folds if isinstance(fold, AddOne)}
    # What is multiplied before it is used is as much smaller.
    row = 0.02 / config["text_config"].get("embedding_multiplier", 1.0)
    tensors = {
        name: _random_tensor(name, shape, generator, norm=0.0 if name in centred else 1.0, row=row)
        for name, shape in _tensor_shapes(config).items()
        if not (spec.decoder.tied_head and name == "lm_head.weight")
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(path, config, spec, tiles_per_edge)
    _write_image_processor(path, spec, tiles_per_edge)
    mark = spec.image_mark or spec.image_token
    if spec.tower.takes_any_size:  # stock tells pictures apart by what stands between them
        mark = mark.join(_FRAME)
    if spec.chat_template is None:
        template = _CHAT_TEMPLATE.replace("<image>", mark)
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    (path / "generation_config.json").write_text('{"eos_token_id": 2}\n', encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(**config),
            attn_implementation="eager",
            trust_remote_code=False,
        )
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def _random_tensor(
    name: str, shape: tuple[int, ...], generator: torch.Generator, *, norm: float, row: float
) -> Tensor:
    """Values of the size that a trained tensor of this name has.

    Weights of norms lie at `norm`, embeddings deviate by `row`.
    """
    if name.endswith("bias"):
        return (torch.randn(shape, generator=generator) * 0.01).to(torch.bfloat16)
    if len(shape) == 1 and "norm" in name.lower().replace("layrnorm", "norm"):
        return (norm + 0.05 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
    fan_in = math.prod(shape[1:])
    scale = row if "embed" in name else fan_in**-0.5
    return (torch.randn(shape, generator=generator) * scale).to(torch.bfloat16)


def _write_tokenizer(
    path: Path, config: dict[str, Any], spec: ModelSpec, tiles_per_edge: int
) -> None:
    """A byte-level BPE of the right size: bytes, then pairs of bytes, specials at their ids."""
    special = {0: _SPECIAL[0], 1: _SPECIAL[1], 2: _SPECIAL[2]}
    placeholder = spec.image_token_id
    places = range(1, tiles_per_edge + 1) if tiles_per_edge > 1 else ()
    named = _named_words(spec)
    pictures = (
        (spec.image_token, *sorted(set(named.values()) - {spec.image_token})) if named else _IMAGE
    )
    texts = [
        (spec.tile_marker or "").format(row=row, column=column)
        for row in places
        for column in places
    ]
    texts += [spec.image_prefix, spec.image_suffix, spec.whole_marker or ""]
    tokens = dict.fromkeys([*pictures, *re.findall(r"<[^<>]+>", "".join(texts))])
    special |= {placeholder + offset: token for offset, token in enumerate(tokens)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words: list[str] = list(alphabet)
    merges: list[tuple[str, str]] = []
    wanted = spec.decoder.vocab_size - len(special)
    for first in alphabet:
        for second in alphabet:
            if len(words) == wanted:
                break
            words.append(first + second)
            merges.append((first, second))
    vocabulary: dict[str, int] = {}
    remaining = iter(words)
    for index in range(spec.decoder.vocab_size):
        token = special.get(index) or next(remaining, f"<unused{index}>")
        vocabulary[token] = index
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(special[index], special=True, normalized=False) for index in sorted(special)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": _SPECIAL[1],
                "eos_token": _SPECIAL[2],
                "pad_token": _SPECIAL[2],
                "model_max_length": config["text_config"]["max_position_embeddings"],
                **({"extra_special_tokens": named} if named else {}),
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )


def _named_words(spec: ModelSpec) -> dict[str, str]:
    """Words of a picture's text that stock's processor asks its tokenizer for, by their names."""
    if spec.image_token in _IMAGE:
        return {}
    framing = dict(zip(("vision_start_token", "vision_end_token"), _FRAME, strict=True))
    named = {**spec.processor.named_tokens, "video_token": "<video>"}
    if not spec.tower.takes_any_size:
        return named
    if spec.family == "glm_ocr":
        framing |= {"video_start": "<|begin_of_video|>", "video_end": "<|end_of_video|>"}
    elif spec.family == "paddleocr_vl":
        framing["image_token"] = spec.image_token
    return named | framing


def _write_image_processor(path: Path, spec: ModelSpec, tiles_per_edge: int) -> None:
    size = spec.tower.height
    if spec.tower.takes_any_size:
        _write_fitted_processor(path, spec)
        return
    common: dict[str, Any] = {"do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
    centred = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    square = {"size": {"height": size, "width": size}, "do_resize": True}
    if isinstance(spec.tiling, Anyres):
        crop = {"crop_size": {"height": size, "width": size}}
        kind = "LlavaNext" if spec.tiling.cuts_several else "LlavaOnevision"
        own: dict[str, Any] = {
            "image_processor_type": f"{kind}ImageProcessor",
            "size": {"height": size, "width": size},
            **(crop if spec.tiling.cuts_several else {}),
            **spec.tiling.settings,
            **centred,
            "resample": 3,
        }
    elif spec.family in ("paligemma", "gemma3"):
        own = {
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": spec.visual_tokens,
            **square,
            "resample": 3,
            **centred,
        }
        if spec.family == "gemma3":
            own |= {"image_processor_type": "Gemma3ImageProcessor", "resample": 2}
            own["do_pan_and_scan"] = None
    elif spec.family == "llava" and not spec.tower.has_cls:
        own = {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": size, "width": size},
            "do_resize": True,
            "resample": 3,
            **centred,
        }
    elif spec.family == "llava":
        own = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "do_resize": True,
            "do_center_crop": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
        }
    elif spec.family == "internvl":
        own = {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": {"height": size, "width": size},
            "crop_to_patches": False,
            "min_patches": 1,
            "max_patches": 12,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
        }
    elif spec.family == "lfm2_vl":
        own = {
            "image_processor_type": "Lfm2VlImageProcessorFast",
            "tile_size": size,
            "encoder_patch_size": spec.tower.patch_size,
            "downsample_factor": spec.projector.merge_factor,
            "min_image_tokens": spec.visual_tokens // 4,
            "max_image_tokens": spec.visual_tokens,
            "do_image_splitting": tiles_per_edge > 1,
            "max_tiles": 2 * tiles_per_edge,
            **centred,
            "resample": 2,
        }
    else:
        own = {
            "image_processor_type": "Idefics3ImageProcessor",
            "size": {"longest_edge": tiles_per_edge * size},
            "max_image_size": {"longest_edge": size},
            "do_resize": True,
            "do_image_splitting": tiles_per_edge > 1,
            "do_pad": True,
            **centred,
            "resample": 1,
        }
    if spec.processor.counts_patches:
        combined: dict[str, Any] = {
            "processor_class": spec.processor.classes[0],
            "patch_size": spec.tower.patch_size,
            "num_additional_image_tokens": int(spec.tower.has_cls),
            "vision_feature_select_strategy": "default" if spec.tower.has_cls else "full",
        }
    elif spec.family == "lfm2_vl":
        combined = {"processor_class": "Lfm2VlProcessor"}
    elif spec.family in ("paligemma", "gemma3"):
        combined = {"processor_class": spec.processor.classes[0]}
        if spec.family == "gemma3":
            combined["image_seq_length"] = spec.visual_tokens
    else:
        kind = spec.processor.stand_in or spec.processor.classes[0]
        count = spec.processor.count_setting
        combined = {"processor_class": kind} | ({count: spec.visual_tokens} if count else {})
    for name, document in (
        ("preprocessor_config.json", {**common, **own}),
        ("processor_config.json", combined),
    ):
        (path / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _write_fitted_processor(path: Path, spec: ModelSpec) -> None:
    patch, merge = spec.tower.patch_size, spec.projector.merge_factor
    kinds = {"glm_ocr": "Glm46VImageProcessor", "paddleocr_vl": "PaddleOCRVLImageProcessor"}
    document = {
        "processor_class": spec.processor.classes[0],
        "image_processor_type": kinds.get(spec.family, "Qwen2VLImageProcessor"),
        "size": {"shortest_edge": (patch * merge) ** 2, "longest_edge": 2**20},
        "fitted_size": {"height": 2 * patch * merge, "width": 4 * patch * merge},
        "patch_size": patch,
        "merge_size": merge,
        "temporal_patch_size": 1 if spec.family == "paddleocr_vl" else 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    text = json.dumps(document, indent=2) + "\n"
    (path / "preprocessor_config.json").write_text(text, encoding="utf-8")
