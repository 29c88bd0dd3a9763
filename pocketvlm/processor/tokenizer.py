"""The tokenizer of a model folder as stock transformers loads it, serialized once.

Much of a tokenizer is configured outside tokenizer.json, and classes of transformers change the
rest when they load it: added tokens, first tokens, prefix spaces. None of these rules is
reimplemented here: the stock class loads the folder, and its state is serialized. Checkpoint and
bundle both use only that serialization.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketvlm.errors import CheckpointError
from pocketvlm.json_io import read_json
from pocketvlm.models.spec import ModelSpec
from pocketvlm.processor.foreign_code import STOCK_ONLY
from pocketvlm.processor.image_processor import quiet_fallbacks
from pocketvlm.prompt.chat_template import ChatTemplate, Message, find_chat_template
from pocketvlm.prompt.codec import PromptCodec, read_tokenizer
from pocketvlm.prompt.picture_text import PictureText

__all__ = ["StockTokenizer", "bounded_templates", "read_stock_tokenizer"]

_CLEANUPS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""Where `clean_up_tokenization_spaces` removes the space."""

_IDEFICS3_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
"""What the processor class of Idefics3 adds to its tokenizer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StockTokenizer:
    """A folder's tokenizer as transformers loads it.

    Attributes:
        tokenizer: The object of transformers.
        serialized: Its content as tokenizer.json.
        codec: Messages to token ids and back.
        spec: The model's specification, with the placeholder as the tokenizer spells it.
        notes: Settings that are not used.
    """

    tokenizer: Any
    serialized: str
    codec: PromptCodec
    spec: ModelSpec
    notes: tuple[str, ...]

    def with_spec(self, spec: ModelSpec) -> StockTokenizer:
        """The same for pictures of another number of visual tokens."""
        picture = replace(self.codec.picture, count=spec.visual_tokens)
        return replace(self, codec=replace(self.codec, picture=picture), spec=spec)

    def runtime_files(self) -> dict[str, bytes]:
        """The text files of a bundle, by name; a stock fast tokenizer loads from them as well."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,  # the decoder of tokenizer.json does it
            "extra_special_tokens": [str(t) for t in self.tokenizer.extra_special_tokens],
            **self.codec.variables,
        }
        if self.codec.control_words is not None:
            config["chat_control_tokens"] = list(self.codec.control_words)
        return {
            "tokenizer.json": self.serialized.encode(),
            "tokenizer_config.json": _dump(config),
            "chat_template.jinja": self.codec.template.source.encode("utf-8", "surrogatepass"),
        }


def read_stock_tokenizer(path: Path, spec: ModelSpec) -> StockTokenizer:
    """Loads the tokenizer and the chat template of a model folder, offline.

    Args:
        path: The folder.
        spec: The model's specification.

    Raises:
        CheckpointError: They are missing or broken, contradict the configuration, or cannot format
            a question about a picture.
    """
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path}: tokenizer.json is missing; a fast tokenizer is needed")
    tokenizer = _load(path)
    processor = _processor_settings(path)
    kind = processor.get("processor_class") or spec.processor.classes[0]
    if kind == "Idefics3Processor":
        tokenizer.add_special_tokens({"additional_special_tokens": list(_IDEFICS3_TOKENS)})
    if spec.processor.added_words:
        tokenizer.add_tokens(list(spec.processor.added_words))
    if not spec.processor.adds_ends:
        tokenizer.add_bos_token = tokenizer.add_eos_token = False
    if tokenizer.split_special_tokens:
        raise CheckpointError(
            f"{path}: tokenizer_config.json sets split_special_tokens, with which no placeholder "
            "of a picture is read as one"
        )
    spec = _named_by_tokenizer(path, spec, tokenizer, processor)
    serialized, notes = _serialize(tokenizer)
    words = getattr(tokenizer, "chat_control_tokens", None)  # since transformers 5.24
    codec = PromptCodec(
        tokenizer=read_tokenizer(serialized, path / "tokenizer.json", error=CheckpointError),
        template=find_chat_template(path, spec.chat_template, error=CheckpointError),
        variables=dict(tokenizer.special_tokens_map),
        picture=PictureText(
            placeholder=spec.image_token,
            count=spec.visual_tokens,
            prefix=spec.image_prefix,
            suffix=spec.image_suffix,
            tile_marker=spec.tile_marker,
            whole_marker=spec.whole_marker,
            mark=spec.image_mark,
        ),
        image_token_id=spec.image_token_id,
        embedding_rows=spec.decoder.vocab_size,
        control_words=None if words is None else tuple(map(str, words)),
        is_prefix=spec.has_prefix_prompt,
    )
    codec.check(path, error=CheckpointError)
    return StockTokenizer(
        tokenizer=tokenizer, serialized=serialized, codec=codec, spec=spec, notes=notes
    )


def _load(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_fallbacks():
            tokenizer = AutoTokenizer.from_pretrained(str(path), **STOCK_ONLY)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as fault:  # anything from KeyError to a Rust panic, not an Exception
        first_line = str(fault).strip().partition("\n")[0] or type(fault).__name__
        raise CheckpointError(f"{path}: the tokenizer cannot be read: {first_line}") from fault
    if not tokenizer.is_fast:
        raise CheckpointError(f"{path}: loads as a slow tokenizer; a fast one is needed")
    return tokenizer


def _processor_settings(path: Path) -> dict[str, Any]:
    """The processor's own settings; the first of three files that names its class counts."""
    settings: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if not (path / name).is_file():
            continue
        document = read_json(path / name, error=CheckpointError)
        if name == "processor_config.json":
            settings.update(document)
        elif "processor_class" not in settings and document.get("processor_class"):
            settings["processor_class"] = document["processor_class"]
    return settings


def _named_by_tokenizer(
    path: Path, spec: ModelSpec, tokenizer: Any, processor: Mapping[str, Any]
) -> ModelSpec:
    """The specification with tokens spelled as the tokenizer spells them."""
    named = tokenizer.special_tokens_map
    found = tokenizer.backend_tokenizer.id_to_token(spec.image_token_id)
    if found is None:
        raise CheckpointError(
            f"{path}: config.json says that token {spec.image_token_id} is the picture's, and the "
            "tokenizer has no such token"
        )
    names = {token: name for name, token in spec.processor.named_tokens.items()}
    placeholder = names.get(spec.image_token, "image_token")
    declared = named.get(placeholder, processor.get(placeholder))
    if isinstance(declared, str) and declared != found:
        raise CheckpointError(
            f"{path}: the processor's {placeholder} is {declared!r}, and token "
            f"{spec.image_token_id}, the picture's in config.json, is {found!r}"
        )
    # Idefics3's class asks its tokenizer for no names.
    is_fixed = processor.get("processor_class") == "Idefics3Processor"
    tokens = {} if is_fixed else spec.processor.named_tokens

    def spell(text: str) -> str:
        for name, token in tokens.items():
            text = text.replace(token, named.get(name, token))
        return text

    return replace(
        spec,
        image_token=found,
        image_prefix=spell(spec.image_prefix),
        image_suffix=spell(spec.image_suffix),
        tile_marker=None if spec.tile_marker is None else spell(spec.tile_marker),
        whole_marker=None if spec.whole_marker is None else spell(spec.whole_marker),
        image_mark=None if spec.image_mark is None else spell(spec.image_mark),
    )


def _serialize(tokenizer: Any) -> tuple[str, tuple[str, ...]]:
    """The tokenizer as text, including what a stock processor does in addition."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    notes: list[str] = []
    for section in ("truncation", "padding"):
        if document.get(section) is not None:
            notes.append(f"{section} of tokenizer.json is not used: prompts are run as they are")
            document[section] = None
    if _cleans_up(tokenizer):
        if document["decoder"] is None:
            notes.append("clean_up_tokenization_spaces is not used: the tokenizer has no decoder")
        else:
            document["decoder"] = _with_cleanup(document["decoder"])
    return json.dumps(document, indent=2, ensure_ascii=False), tuple(notes)


def _cleans_up(tokenizer: Any) -> bool:
    # Releases before 5.24 do not know this attribute.
    forced = getattr(
        tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False
    )
    is_bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    return bool(tokenizer.clean_up_tokenization_spaces and (forced or not is_bpe))


def _with_cleanup(decoder: Mapping[str, Any]) -> dict[str, Any]:
    replacements = [
        {"type": "Replace", "pattern": {"String": text}, "content": text.strip()}
        for text in _CLEANUPS
    ]
    return {"type": "Sequence", "decoders": [decoder, {"type": "Fuse"}, *replacements]}


def _dump(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def bounded_templates() -> Iterator[None]:
    """Makes transformers' own processors render chat templates in the bounded sandbox.

    A template can tell the two apart, by time or by a name, so that one which ends here could run
    forever there. The tests show that both render the same text.
    """
    from transformers.utils import chat_template_utils

    stock = chat_template_utils._compile_jinja_template  # noqa: SLF001  (there is no public place)
    chat_template_utils._compile_jinja_template = _BoundedTemplate  # noqa: SLF001
    try:
        yield
    finally:
        chat_template_utils._compile_jinja_template = stock  # noqa: SLF001


class _BoundedTemplate:
    """Stands in for a compiled template of transformers."""

    def __init__(self, source: str) -> None:
        self._template = ChatTemplate(source, Path("the chat template"))
        self.environment = self._template.environment

    def render(
        self,
        *,
        messages: list[Message],
        add_generation_prompt: bool,
        tools: Any,
        documents: Any,
        **variables: Any,
    ) -> str:
        """Renders like transformers' own object; tools and documents are never passed."""
        if tools is not None or documents is not None:
            raise ValueError("tools and documents are not used here")
        return self._template.render(
            messages, variables, add_generation_prompt=add_generation_prompt
        )
