"""Messages to token ids and back, for checkpoints and bundles alike.

The result is that of transformers' processors with `sanitize_control_tokens=True`: what a user
types is never a control token. Hugging Face's default tokenizes the rendered prompt as a whole, so
that a user who writes `<image>` or `<|im_end|>` injects a picture or ends the turn. Such words are
marked before the template runs, and marked words are read as plain characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from pocketvlm.errors import InputError, PocketVLMError
from pocketvlm.models.images.tilings import ONE_TILE, TileGrid
from pocketvlm.prompt.chat_template import ChatTemplate, Message
from pocketvlm.prompt.picture_text import PictureText

__all__ = ["PromptCodec", "read_tokenizer"]

# Private-use characters, as in transformers; users cannot type them, because they are removed.
_START, _END = "\U000f0000", "\U000f0001"
_PROBE = "What is in the picture?"


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptCodec:
    """Tokenizer, chat template and picture block of one model.

    Attributes:
        tokenizer: The tokenizer, which reads special tokens as control tokens.
        template: Turns messages into a prompt.
        variables: Other names that the template may use, such as `bos_token`.
        picture: What the placeholder that the template writes for a picture is expanded to.
        image_token_id: The placeholder as an id.
        embedding_rows: Rows of the embedding table; ids must be smaller. `None` if unknown.
        control_words: Added tokens that are control tokens in addition to the special ones; `None`
            for those that the template writes.
        is_prefix: Whether `bos_token` stands after the last picture and a line break ends the
            prompt, as PaliGemma's processor writes what it calls the prefix (arXiv 2407.07726).
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    variables: Mapping[str, str]
    picture: PictureText
    image_token_id: int
    embedding_rows: int | None = None
    control_words: tuple[str, ...] | None = None
    is_prefix: bool = False

    def __post_init__(self) -> None:
        # Control tokens even if the tokenizer's files do not say so.
        token = AddedToken(self.image_token, special=True, normalized=False)
        self.tokenizer.add_special_tokens([token])

    def check(self, where: object, *, error: type[PocketVLMError]) -> None:
        """Checks what every prompt depends on: that a question about a picture can be formatted.

        Args:
            where: The folder, for the message.
            error: What is raised when it cannot.

        Raises:
            PocketVLMError: `error`: the template is not Jinja, drops the picture, or prints Python.
        """
        self.template.check(error=error)
        content = [{"type": "image"}, {"type": "text", "text": _PROBE}]
        messages = [{"role": "user", "content": content}]
        asked = "the chat template cannot write a question about a picture (made for text alone?)"
        try:
            text = self.template.render(messages, self.variables)
            self.encode(messages)
        except InputError as fault:
            raise error(f"{where}: {asked}: {fault}") from fault
        if _PROBE not in text or f"'text': '{_PROBE}'" in text or f'"text": "{_PROBE}"' in text:
            raise error(
                f"{where}: {asked}: it was made for text alone and prints what a message holds "
                "as a list"
            )

    @property
    def image_token(self) -> str:
        """The placeholder of a picture, as text."""
        return self.picture.placeholder

    def encode(
        self,
        messages: Sequence[Message],
        grids: Sequence[TileGrid] | None = None,
        *,
        counts: Sequence[int] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation, every picture expanded to the placeholders of its tiles.

        Args:
            messages: The whole conversation, oldest turn first.
            grids: How each picture is cut, in their order; `None` where none is.
            counts: Placeholders of a tile of each picture; `None` for `picture.count` of all.
            add_generation_prompt: Whether the assistant's turn is opened at the end.

        Raises:
            InputError: The chat template refuses the conversation or does not write one placeholder
                per picture, the prompt is empty, or a token has no row in the embedding table.
        """
        text = self.render(messages, add_generation_prompt=add_generation_prompt)
        pictures = sum(map(_count_pictures, messages))
        cuts = [ONE_TILE] * pictures if grids is None else grids
        if len(cuts) != pictures:
            raise ValueError(f"{len(cuts)} grids of tiles are given for {pictures} pictures")
        # transformers' rule: a template that writes the first token itself writes all of them. The
        # first token of a prefix is not the template's.
        bos = self.variables.get("bos_token")
        adds_tokens = self.is_prefix or not (bos and text.startswith(bos))
        sizes = [self.picture.count] * pictures if counts is None else counts
        blocks = iter(
            [
                replace(self.picture, count=count).write(grid)
                for grid, count in zip(cuts, sizes, strict=True)
            ]
        )
        text = self._placeholder.sub(lambda _: next(blocks), text)
        try:
            ids = self._encode_text(text, adds_tokens=adds_tokens)
        except (InputError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as fault:  # a Rust panic is not an Exception
            first_line = str(fault).partition("\n")[0]
            raise InputError(f"the prompt cannot be tokenized: {first_line}") from fault
        if not ids:
            raise InputError("the chat template turns this prompt into no tokens")
        self._require_rows(ids)
        return ids

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation with one mark per picture, as `encode` tokenizes it.

        Words of a message that would be read as control tokens stand between U+F0000 and U+F0001,
        and are plain characters: a device without Jinja is sent this text.

        Args:
            messages: The whole conversation, oldest turn first.
            add_generation_prompt: Whether the assistant's turn is opened at the end.

        Raises:
            InputError: The chat template refuses the conversation, or does not write one mark per
                picture.
        """
        marked = [_mark(message, self._control) for message in messages]
        answer = marked.pop() if self.is_prefix and _is_answer(marked[-1]) else None
        text = self.template.render(
            marked, self.variables, add_generation_prompt=add_generation_prompt
        )
        pictures = sum(map(_count_pictures, messages))
        placeholders = len(self._placeholder.findall(text))
        if placeholders != pictures:
            raise InputError(
                f"the chat template writes {self._picture_mark!r} {placeholders} times for "
                f"{pictures} pictures"
            )
        return self._framed(text, answer)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, without special tokens, stripped."""
        return self.decode_raw(token_ids).strip()

    def decode_raw(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, without special tokens, with all spaces.

        Raises:
            InputError: The tokenizer's decoder breaks on them.
        """
        try:
            return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as fault:  # as above
            first_line = str(fault).partition("\n")[0]
            raise InputError(f"the answer cannot be turned into text: {first_line}") from fault

    def _encode_text(self, text: str, *, adds_tokens: bool) -> list[int]:
        if _START not in text and _END not in text:
            return list(self.tokenizer.encode(text, add_special_tokens=adds_tokens).ids)
        before, behind = self._frame if adds_tokens else ([], [])
        first, *pieces = self._marked.split(text)
        ids = [*before, *self.tokenizer.encode(first, add_special_tokens=False).ids]
        for number, piece in enumerate(pieces):
            if piece and number % 2 == 0:  # a marked word
                found = self._encode_inside(piece, plain=True)
                if self.tokenizer.token_to_id(piece) in found:
                    raise InputError(
                        f"{piece!r} cannot be read as plain text: the tokenizer turns its letters "
                        "into the control token"
                    )
                ids += found
            elif piece:
                ids += self._encode_inside(piece, plain=False)
        return ids + behind

    def _encode_inside(self, text: str, *, plain: bool) -> list[int]:
        """Ids of text inside a prompt, without the space that is added at the start of a text."""
        encode = self._encode_plain if plain else self._encode_piece
        newline, ids = self._encode_piece("\n"), encode(f"\n{text}")
        return ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)

    def _encode_piece(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_plain(self, text: str) -> list[int]:
        """Ids without added tokens: the tokenizer's pipeline after the search for those."""
        tokenizer = self.tokenizer
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        pieces = [text]
        if tokenizer.pre_tokenizer is not None:
            pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in tokenizer.model.tokenize(piece)]

    def _require_rows(self, ids: Sequence[int]) -> None:
        rows = self.embedding_rows
        if rows is None:
            return
        for token in ids:
            # A placeholder's own row is never read: the picture's rows replace it.
            if token >= rows and token != self.image_token_id:
                raise InputError(
                    f"the prompt holds {self.tokenizer.id_to_token(token)!r}, token {token}, but "
                    f"the model's embedding table ends at {rows - 1}"
                )

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        bare = self.tokenizer.encode("a", add_special_tokens=False).ids
        ids = self.tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(ids) - len(bare) + 1):
            if ids[start : start + len(bare)] == bare:
                return ids[:start], ids[start + len(bare) :]
        return [], []

    @property
    def _picture_mark(self) -> str:
        """What the template writes for a picture."""
        return self.picture.placeholder if self.picture.mark is None else self.picture.mark

    @cached_property
    def _placeholder(self) -> re.Pattern[str]:
        """The mark of a picture that was written by the template, not by the user."""
        return re.compile(f"(?<!{_START}){re.escape(self._picture_mark)}")

    def _framed(self, text: str, answer: Message | None) -> str:
        """The rendered prompt with what a processor adds to it, and the answer after a prefix."""
        if not self.is_prefix:
            return text
        ends = [0, *(found.end() for found in self._placeholder.finditer(text))]
        first = self.variables.get("bos_token", "")
        framed = f"{text[: ends[-1]]}{first}{text[ends[-1] :]}\n"
        if answer is None:
            return framed
        return framed + _text_of(answer) + self.variables.get("eos_token", "")

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Control tokens in text; the longest wins."""
        return _any_of(token.content for token in self._added if self._is_control(token))

    @cached_property
    def _marked(self) -> re.Pattern[str]:
        any_added = _any_of(token.content for token in self._added).pattern
        return re.compile(f"{_START}({any_added}){_END}|[{_START}{_END}]")

    @cached_property
    def _added(self) -> tuple[AddedToken, ...]:
        return tuple(self.tokenizer.get_added_tokens_decoder().values())

    def _is_control(self, token: AddedToken) -> bool:
        if token.special or self.picture.writes(token.content):
            return True
        if self.control_words is not None:
            return token.content in self.control_words
        return token.content in self.template.literals and not token.content.isspace()


def read_tokenizer(text: str, where: object, *, error: type[PocketVLMError]) -> Tokenizer:
    """Reads the content of a tokenizer.json; padding and truncation are turned off.

    Args:
        text: The content.
        where: Where it comes from, for the message.
        error: What is raised when it is not a tokenizer.

    Raises:
        PocketVLMError: `error`, with one line.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as fault:  # a Rust panic is not an Exception
        first_line = str(fault).partition("\n")[0]
        raise error(f"{where}: not a tokenizer: {first_line}") from fault
    return tokenizer


def _mark(value: Any, control: re.Pattern[str]) -> Any:
    """Marks control words in the texts of a message; names of fields stay."""
    if isinstance(value, str):
        bare = value.replace(_START, "").replace(_END, "")
        return control.sub(f"{_START}\\g<0>{_END}", bare)
    if isinstance(value, Mapping):
        return {key: _mark(item, control) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mark(item, control) for item in value]
    return value


def _is_answer(message: Message) -> bool:
    return message.get("role") == "assistant"


def _text_of(message: Message) -> str:
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return "".join(item.get("text", "") for item in content)


def _count_pictures(message: Message) -> int:
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return 0
    return sum(
        isinstance(item, Mapping) and item.get("type") in ("image", "image_url") for item in content
    )


def _any_of(words: Iterator[str]) -> re.Pattern[str]:
    longest_first = sorted({word for word in words if word}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
