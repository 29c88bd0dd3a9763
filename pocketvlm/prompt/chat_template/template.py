"""A chat template, rendered as in transformers, within bounds."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateSyntaxError, nodes

from pocketvlm.errors import InputError, PocketVLMError
from pocketvlm.prompt.chat_template.budget import Budget
from pocketvlm.prompt.chat_template.sandbox import TemplateSandbox

__all__ = ["ChatTemplate", "Message"]

Message = Mapping[str, Any]
"""One chat message: `role`, and `content` as text or as a list of image and text items."""

_MAX_SOURCE_BYTES = 2**16  # three times the longest published ones
_SHOWN = 200
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ChatTemplate:
    """A template that turns messages into a prompt.

    Attributes:
        source: Its Jinja source.
        origin: The file that holds it, for messages.
    """

    source: str
    origin: Path

    def check(self, *, error: type[PocketVLMError]) -> None:
        """Compiles the template.

        Args:
            error: What is raised when that fails.

        Raises:
            PocketVLMError: `error`: it is not Jinja, too long, or uses what is not available.
        """
        size = len(self.source.encode("utf-8", "surrogatepass"))
        if size > _MAX_SOURCE_BYTES:
            raise error(
                f"{self.origin}: the chat template has {size:,} bytes; at most "
                f"{_MAX_SOURCE_BYTES:,} are read"
            )
        try:
            self._compiled  # noqa: B018  (compiles it once, for good)
        except TemplateSyntaxError as fault:
            raise error(
                f"{self.origin}: the chat template is not Jinja, line {fault.lineno}: "
                f"{_one_line(fault.message)}"
            ) from fault
        except Exception as fault:  # compiling uses Python's own compiler
            raise error(
                f"{self.origin}: the chat template cannot be compiled: {_reason(fault)}"
            ) from fault

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Renders a conversation as transformers does.

        Args:
            messages: The whole conversation, oldest turn first.
            variables: Other names that the template may use, such as `bos_token`.
            add_generation_prompt: Whether the assistant's turn is opened at the end.

        Raises:
            InputError: The template refuses the conversation, or computes more than it may.
        """
        plain = [_template_message(message) for message in messages]
        with _RENDERING:
            try:
                compiled = self._compiled  # has its own budget
                _SANDBOX.budget = Budget((plain, dict(variables)))
                return compiled.render(
                    {
                        "messages": plain,
                        "tools": None,
                        "documents": None,
                        "add_generation_prompt": add_generation_prompt,
                        **variables,
                    }
                )
            except Exception as fault:  # a template may raise anything
                raise InputError(
                    f"the chat template refuses this conversation: {_reason(fault)}"
                ) from fault

    @property
    def environment(self) -> TemplateSandbox:
        """The environment that parses and renders it."""
        return _SANDBOX

    @cached_property
    def literals(self) -> str:
        """Every text that the template itself may write, separated by NUL."""
        with _RENDERING:
            tree = _SANDBOX.parse(self.source)
        found = {node.data for node in tree.find_all(nodes.TemplateData)}
        found |= {c.value for c in tree.find_all(nodes.Const) if isinstance(c.value, str)}
        return "\0".join(sorted(found))

    @cached_property
    def _compiled(self) -> Template:
        with _RENDERING:
            _SANDBOX.budget = Budget()
            tree = _SANDBOX.parse_bounded(self.source)
            return Template.from_code(_SANDBOX, _SANDBOX.compile(tree), dict(_SANDBOX.globals))


def _template_message(message: Message) -> dict[str, Any]:
    """A message as templates see it: plain data, no empty keys, one name for pictures."""
    plain = {key: _plain(value) for key, value in message.items() if value is not None}
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = [_template_item(item) for item in content]
    thought = next((plain[key] for key in _REASONING if plain.get(key) is not None), None)
    if thought is not None:
        plain = {"thinking": thought, **plain, "reasoning_content": thought}
    return plain


def _template_item(item: Any) -> Any:
    if isinstance(item, dict) and item.get("type") == "image_url" and "image_url" in item:
        link = item["image_url"]
        return {"type": "image", "url": link.get("url", "") if isinstance(link, dict) else link}
    return item


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"  # such as a picture


def _reason(fault: BaseException) -> str:
    if isinstance(fault, RecursionError):
        return "it recurses endlessly"
    if isinstance(fault, MemoryError):
        return "it is nested too deeply, or needs too much memory"
    return _one_line(str(fault)) or type(fault).__name__


def _one_line(text: str | None) -> str:
    line = " ".join((text or "")[: 4 * _SHOWN].split())
    line = "".join(sign if sign.isprintable() else "\ufffd" for sign in line)
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


_SANDBOX = TemplateSandbox()
_RENDERING = threading.RLock()
"""One rendering at a time: the sandbox has one budget."""
