"""Keys of a config.json: which ones a family's reader used, and which ones cannot matter.

A key that changes what a model computes and that the description has no field for would end in an
artifact that answers otherwise than the model. So a reader reads through `ReadConfig`, which
remembers what it was asked for, and every other key must hold what the library's class has as its
default, or stand in `WITHOUT_EFFECT`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["WITHOUT_EFFECT", "ReadConfig", "find_unread"]

WITHOUT_EFFECT = frozenset(
    {
        # What a file says about itself and about its storage.
        "_name_or_path", "architectures", "transformers_version", "model_type", "name_or_path",
        "dtype", "torch_dtype", "quantization_config", "tie_encoder_decoder", "is_decoder",
        # What a call returns, and how it is split; never its values.
        "output_attentions", "output_hidden_states", "return_dict", "use_cache", "use_return_dict",
        "chunk_size_feed_forward", "is_encoder_decoder", "add_cross_attention",
        # Training alone.
        "attention_dropout", "hidden_dropout", "dropout", "initializer_range", "initializer_factor",
        "neftune_noise_alpha", "pretraining_tp", "router_aux_loss_coef", "gradient_checkpointing",
        "hidden_dropout_prob", "projection_dropout", "layer_scale_init_value",
        # Heads of other tasks.
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
        "task_specific_params", "projection_dim", "vision_use_head", "logit_scale_init_value",
        # Read where prompts are made and answers end: generation settings, processor, tokenizer.
        "bos_token_id", "eos_token_id", "pad_token_id", "_pad_token_id", "sep_token_id",
        "decoder_start_token_id", "image_seq_length", "bad_words_ids", "suppress_tokens",
        "begin_suppress_tokens", "video_token_id", "vision_start_token_id", "vision_end_token_id",
        "tokens_per_second", "forced_bos_token_id", "forced_eos_token_id", "max_length",
        "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
        "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
        "num_return_sequences", "output_scores", "return_dict_in_generate",
        "remove_invalid_values", "exponential_decay_length_penalty",
    }
)  # fmt: skip
"""Keys that change no logit of a picture and a prompt, in any family, at any depth."""


class ReadConfig(Mapping[str, Any]):
    """A configuration that remembers which of its keys were asked for.

    Args:
        values: Its content; nested configurations are remembered by the same set.
        used: Where the paths go, `text_config.hidden_size` and the like.
        path: Where it stands itself.
    """

    def __init__(self, values: Mapping[str, Any], used: set[str], path: str = "") -> None:
        self._values, self._used, self._path = values, used, path

    def __getitem__(self, key: str) -> Any:
        path = f"{self._path}{key}"
        self._used.add(path)
        value = self._values[key]
        return ReadConfig(value, self._used, f"{path}.") if isinstance(value, Mapping) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def find_unread(
    values: Mapping[str, Any], defaults: Mapping[str, Any], used: set[str], path: str = ""
) -> Iterator[tuple[str, Any, bool]]:
    """Keys that no reader asked for, and that say something else than the class's default.

    Args:
        values: Content of a configuration, defaults of its class filled in.
        defaults: What a configuration of the class holds without any values, nested ones likewise.
        used: Paths that a reader asked for.
        path: Where the configuration stands.

    Yields:
        Path, value, and whether the class knows the key: one that it does not know changes nothing
        in the library's model either.
    """
    for key, value in values.items():
        here = f"{path}{key}"
        is_known = key in defaults
        default = defaults.get(key)
        if key in WITHOUT_EFFECT or value is None or (is_known and value == default):
            continue
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            is_class = "model_type" in default
            for place, own, knows in find_unread(value, default, used, f"{here}."):
                # Options without a class, such as those of rotary positions, are all meant.
                yield place, own, knows or not is_class
        elif here not in used:
            yield here, value, is_known
