"""How answer tokens are chosen: end tokens, and the settings of generation_config.json.

Every setting that a greedy answer depends on is applied here, to one row of logits, by the same
code for a checkpoint in torch and for a bundle's runtime, in the order of transformers. Settings
that are not applied are named in `notes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketvlm.errors import PocketVLMError
from pocketvlm.files.reader import locate
from pocketvlm.json_io import DecodeError, decode, read_json

__all__ = ["GenerationSettings", "read_generation_settings"]

Logits = npt.NDArray[np.float32]
_SHOWN = 40

_UNAPPLIED: Mapping[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "constraints": (),
    "diversity_penalty": (0.0,),
    "do_sample": (False,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "force_words_ids": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (),
    "stop_strings": (),
    "token_healing": (False,),
    "watermarking_config": (),
}
"""Settings that change answers and are not applied, with the values that have no effect."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What decides the next token in addition to the logits, under the names of transformers.

    Attributes:
        eos_token_ids: Tokens that end an answer.
        sequence_bias: Pairs of a token sequence and what is added to the logit of its last token if
            the others come before it.
        encoder_repetition_penalty: Favours tokens of the prompt above 1.
        repetition_penalty: Weakens tokens of prompt and answer above 1.
        no_repeat_ngram_size: Runs of this many tokens may occur only once; 0 for no limit.
        bad_words_ids: Sequences of tokens that must not be written.
        min_length: Tokens of prompt and answer before which the answer does not end.
        min_new_tokens: Tokens of the answer before which it does not end.
        exponential_decay_length_penalty: After how many tokens of the answer its end is favoured,
            and the factor per further token.
        suppress_tokens: Tokens that are never written.
        begin_suppress_tokens: Tokens that are not written first.
    """

    eos_token_ids: tuple[int, ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    encoder_repetition_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("encoder_repetition_penalty", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")
        words = (*self.bad_words_ids, *(sequence for sequence, _ in self.sequence_bias))
        if not all(words):
            raise ValueError("bad_words_ids and sequence_bias must not hold empty sequences")
        for token in (*self.eos_token_ids, *(token for word in words for token in word)):
            if token < 0:
                raise ValueError(f"token {token} is below 0")

    @classmethod
    def from_stock(
        cls, document: Mapping[str, Any], where: object, *, error: type[PocketVLMError]
    ) -> GenerationSettings:
        """Reads what transformers' `GenerationConfig.to_dict` holds, or generation_config.json.

        Args:
            document: The content; other keys are ignored.
            where: Where it comes from, for the message.
            error: What is raised when a value does not fit.

        Raises:
            PocketVLMError: `error`, with one line.
        """
        names = {item.name for item in fields(cls)}
        values = {k: v for k, v in document.items() if k in names and v is not None}
        ends = document.get("eos_token_id")
        values["eos_token_ids"] = [] if ends is None else ends if isinstance(ends, list) else [ends]
        try:
            return decode(cls, values)
        except DecodeError as fault:
            raise error(f"{where}: {fault}") from fault

    def to_json(self) -> dict[str, Any]:
        """Settings that differ from the defaults, without the end tokens, as JSON values."""
        values = asdict(self)
        return {
            item.name: values[item.name]
            for item in fields(self)
            if item.name != "eos_token_ids" and values[item.name] != item.default
        }

    @property
    def is_plain(self) -> bool:
        """Whether the next token is simply the likeliest."""
        # Asked for every token of an answer, so without the copies that `to_json` makes.
        return all(
            getattr(self, item.name) == item.default
            for item in fields(self)
            if item.name != "eos_token_ids"
        )

    def adjust(self, logits: Logits, prompt: Sequence[int], answer: Sequence[int]) -> Logits:
        """The logits after every setting.

        Args:
            logits: float32 [vocabulary].
            prompt: Tokens of the prompt, including every placeholder of a picture.
            answer: Tokens of the answer so far.
        """
        if self.is_plain:
            return logits
        scores = logits.astype(np.float32, copy=True)
        said = (*prompt, *answer)
        ends = _within(self.eos_token_ids, scores)
        self._add_bias(scores, self.sequence_bias, said)
        _penalize(scores, prompt, 1 / self.encoder_repetition_penalty)
        _penalize(scores, said, self.repetition_penalty)
        self._forbid_repeats(scores, said)
        # With its end token forbidden an answer would never end; transformers ignores such words.
        words = [word for word in self.bad_words_ids if word[1:] or word[0] not in ends]
        self._add_bias(scores, tuple((word, -np.inf) for word in words), said)
        if len(said) < self.min_length or len(answer) < self.min_new_tokens:
            scores[ends] = -np.inf
        self._favour_end(scores, ends, len(answer))
        scores[_within(self.suppress_tokens, scores)] = -np.inf
        if not answer:
            scores[_within(self.begin_suppress_tokens, scores)] = -np.inf
        return scores

    @staticmethod
    def _add_bias(
        scores: Logits,
        biases: Sequence[tuple[tuple[int, ...], float]],
        said: tuple[int, ...],
    ) -> None:
        total = np.zeros_like(scores)
        for (*before, last), bias in biases:
            start = len(said) - len(before)
            if start >= 0 and list(said[start:]) == before and last < scores.size:
                total[last] += bias
        scores += total

    def _forbid_repeats(self, scores: Logits, said: tuple[int, ...]) -> None:
        size = self.no_repeat_ngram_size
        if not 0 < size <= len(said):
            return
        suffix = said[len(said) + 1 - size :]
        found = [
            said[start + size - 1]
            for start in range(len(said) - size + 1)
            if said[start : start + size - 1] == suffix
        ]
        scores[_within(found, scores)] = -np.inf

    def _favour_end(self, scores: Logits, ends: list[int], length: int) -> None:
        if self.exponential_decay_length_penalty is None:
            return
        start, factor = self.exponential_decay_length_penalty
        if length > start and ends:
            own = scores[ends]
            with np.errstate(over="ignore"):
                growth = np.power(np.float64(factor), length - start) - 1
                gain = np.abs(own) * np.float32(growth)
            scores[ends] = own + np.where(np.isfinite(own), gain, np.float32(0))


def read_generation_settings(
    folder: Path, *, error: type[PocketVLMError]
) -> tuple[GenerationSettings, tuple[str, ...]]:
    """The settings of a model folder, from the files that transformers uses.

    That is generation_config.json; without one, config.json and, for what it leaves open, its
    text_config. The tokenizer's own end token does not count.

    Args:
        folder: The folder.
        error: What is raised when a value does not fit.

    Returns:
        The settings, and a note per setting that changes answers and is not applied.

    Raises:
        PocketVLMError: `error`, with one line.
    """
    name = "generation_config.json"
    if (folder / name).exists():
        document = read_json(locate(folder, name, error=error), error=error)
    else:
        name = "config.json"
        config = read_json(locate(folder, name, error=error), error=error)
        text = config.get("text_config")
        document = dict(text) if isinstance(text, Mapping) else {}
        document |= {key: value for key, value in config.items() if value is not None}
    settings = GenerationSettings.from_stock(document, folder / name, error=error)
    notes = []
    for key, harmless in _UNAPPLIED.items():
        value = document.get(key)
        if value is not None and value not in harmless:
            shown = str(value)
            shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
            notes.append(
                f"{name}: {key}={shown} is not applied: answers are greedy, one token at a time"
            )
    if not settings.is_plain:
        applied = ", ".join(settings.to_json())
        notes.append(
            f"{name}: {applied} applied by this package's loop; others (MultimodalRunner, an app's "
            "own) must do it themselves"
        )
    return settings, tuple(notes)


def _within(tokens: Sequence[int], scores: Logits) -> list[int]:
    return [token for token in tokens if 0 <= token < scores.size]


def _penalize(scores: Logits, tokens: Sequence[int], penalty: float) -> None:
    if penalty == 1:
        return
    chosen = _within(sorted(set(tokens)), scores)
    own = scores[chosen]
    scores[chosen] = np.where(own < 0, own * np.float32(penalty), own / np.float32(penalty))
