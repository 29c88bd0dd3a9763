"""Messages to token ids and back, from the tokenizer and chat template of a bundle alone.

The result equals `Processor.encode` with one exception that is meant: what a user types is never
control. Hugging Face tokenizes the rendered prompt as a whole, so a user who writes `<image>` or
`<|im_end|>` injects a picture or ends the turn. Here such text is set aside before the template
runs and read as the plain characters that it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError, InputError
from pocketvlm.json_io import read_json

__all__ = ["Message", "TextCodec", "assistant_message", "user_message"]

Message = Mapping[str, Any]
"""One chat message: `role`, and `content` as text or as a list of image and text items."""

_NAMED_TOKENS = tuple(
    f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


def user_message(text: str, images: int = 0) -> Message:
    """A user's turn: `images` pictures, then the text."""
    pictures: list[dict[str, str]] = [{"type": "image"}] * images
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def assistant_message(text: str) -> Message:
    """A finished answer."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@dataclass(frozen=True, kw_only=True, eq=False)
class TextCodec:
    """Tokenizer, chat template and prompt block of one bundle.

    Attributes:
        tokenizer: The tokenizer, which reads special tokens as control.
        template: The Jinja template that turns messages into a prompt.
        named_tokens: What the template may call `bos_token`, `eos_token` and so on.
        image_token: The placeholder that the template writes for a picture.
        image_token_id: The same as an id.
        image_block: What the placeholder is expanded to: all N placeholders, in their frame.
        eos_token_ids: Ids that end an answer.
    """

    tokenizer: Tokenizer
    template: str
    named_tokens: Mapping[str, str]
    image_token: str
    image_token_id: int
    image_block: str
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> TextCodec:
        """Reads tokenizer.json, the chat template and the manifest's prompt block.

        Raises:
            BundleError: One of them is missing, damaged, or contradicts another.
        """
        path, manifest = bundle.path, bundle.manifest
        prompt = manifest.prompt
        image_token, image_token_id = prompt.image_token, prompt.image_token_id
        placeholders = image_token * manifest.visual_tokens_full
        image_block = f"{prompt.image_prefix}{placeholders}{prompt.image_suffix}"
        eos_token_ids = manifest.generation.eos_token_ids
        tokenizer = _read_tokenizer(path)
        if tokenizer.token_to_id(image_token) != image_token_id:
            raise BundleError(
                f"{path}: tokenizer.json has {image_token!r} at "
                f"{tokenizer.token_to_id(image_token)}, the manifest at {image_token_id}"
            )
        # Control even where tokenizer.json does not say so.
        tokenizer.add_special_tokens([AddedToken(image_token, special=True, normalized=False)])
        codec = cls(
            tokenizer=tokenizer,
            template=_read_template(path),
            named_tokens=_read_named_tokens(path),
            image_token=image_token,
            image_token_id=image_token_id,
            image_block=image_block,
            eos_token_ids=eos_token_ids,
        )
        try:
            codec._compiled  # noqa: B018  (a broken template is a broken bundle, so compile now)
        except TemplateSyntaxError as error:
            raise BundleError(
                f"{path}: the chat template is no Jinja, line {error.lineno}: {error.message}"
            ) from error
        return codec

    def encode(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, every picture expanded to all N of its placeholders.

        Args:
            messages: The whole conversation, oldest turn first.
            add_generation_prompt: Whether the assistant's turn is opened at the end.

        Raises:
            InputError: The chat template refuses the conversation.
        """
        guard = _ControlGuard(messages, self._control)
        try:
            text = self._compiled.render(
                messages=guard.messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.named_tokens,
            )
        except (TemplateError, TypeError) as error:  # TypeError: text where it wants a list
            raise InputError(f"the chat template refuses this conversation: {error}") from error
        text = text.replace(self.image_token, self.image_block)
        if not guard.typed:
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        token_ids: list[int] = []
        for piece in self._control.split(text):
            control = self.tokenizer.token_to_id(piece) if self._control.fullmatch(piece) else None
            if control is not None:
                token_ids.append(control)
            elif piece:
                plain = guard.restore(piece)
                token_ids += self._plain_tokenizer.encode(plain, add_special_tokens=False).ids
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out, spaces at both ends removed."""
        return self.decode_raw(token_ids).strip()

    def decode_raw(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out, spaces kept."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    @cached_property
    def _compiled(self) -> Any:
        return _environment().from_string(self.template)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Finds control tokens in text; the longest wins, as in the tokenizer."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        contents = sorted({token.content for token in added if token.special}, key=len)
        return re.compile("(" + "|".join(re.escape(content) for content in contents[::-1]) + ")")

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        """The same tokenizer with control tokens off; only prompts that hold some pay for it."""
        plain = Tokenizer.from_str(self.tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain


class _ControlGuard:
    """Puts a harmless mark for each control token that a user typed, and takes it back."""

    def __init__(self, messages: Sequence[Message], control: re.Pattern[str]) -> None:
        self.typed: list[str] = []
        self._control = control
        everything = json.dumps(list(messages), ensure_ascii=False, default=str)
        # Private-use characters; one more of them than any run in the text itself.
        self._fence = "\ue0f7"
        while self._fence in everything:
            self._fence += "\ue0f7"
        self.messages = [self._guard_message(message) for message in messages]

    def _guard_message(self, message: Message) -> dict[str, Any]:
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": self._guard(content)}
        items = [
            {**item, "text": self._guard(item["text"])} if "text" in item else dict(item)
            for item in content
        ]
        return {**message, "content": items}

    def _guard(self, text: str) -> str:
        return self._control.sub(self._mark, text)

    def _mark(self, found: re.Match[str]) -> str:
        self.typed.append(found.group())
        return f"{self._fence}{len(self.typed) - 1}{self._fence}"

    def restore(self, text: str) -> str:
        """The text as the user typed it."""
        pattern = f"{self._fence}([0-9]+){self._fence}"
        return re.sub(pattern, lambda found: self.typed[int(found.group(1))], text)


class _GenerationTag(Extension):
    """Renders the body of `{% generation %}`, with which templates mark answers for training."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox and the names that Hugging Face gives to chat templates."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)  # noqa: DTZ005  (a prompt states local time)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # a prompt is no HTML
        extensions=[_GenerationTag, loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _read_tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise BundleError(f"{path}: tokenizer.json is missing")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises plain Exception
        first_line = str(error).partition("\n")[0]
        raise BundleError(f"{file}: not a tokenizer: {first_line}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_template(path: Path) -> str:
    """The template, looked for where `Processor` looks, in the same order."""
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (path / name).is_file():
            template = read_json(path / name).get("chat_template")
            if isinstance(template, str):
                return template
    raise BundleError(f"{path}: no chat template; expected chat_template.jinja")


def _read_named_tokens(path: Path) -> dict[str, str]:
    """Names of special tokens; configs of earlier versions leave them to a second file."""
    config = _read_optional(path / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _read_optional(path / "special_tokens_map.json")
    named: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            named[name] = content
    return named


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
