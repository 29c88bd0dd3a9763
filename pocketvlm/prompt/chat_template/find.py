"""Where a checkpoint or bundle keeps its chat template.

The search order is that of transformers' processors: processor_config.json, the older
chat_template.json, chat_template.jinja with its folder of named templates, and last
tokenizer_config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketvlm.errors import PocketVLMError
from pocketvlm.files.reader import locate, read_bytes
from pocketvlm.json_io import parse_json
from pocketvlm.prompt.chat_template.template import ChatTemplate

__all__ = ["TEMPLATE_FILE", "find_chat_template"]

TEMPLATE_FILE = "chat_template.jinja"
_FOLDER = "additional_chat_templates"
_BUILT_IN = "the model's own prompt"


def find_chat_template(
    folder: Path, default: str | None = None, *, error: type[PocketVLMError]
) -> ChatTemplate:
    """The chat template of a checkpoint or bundle.

    Args:
        folder: The folder.
        default: The template of a model whose folder has none; `None` if it must have one.
        error: What is raised when there is none, or its file cannot be read.

    Raises:
        PocketVLMError: `error`; for instance, none of several templates is called default.
    """

    def read(name: str) -> str | None:
        if not (folder / name).exists():
            return None
        path = locate(folder, name, error=error)
        try:
            # Unchanged: whatever is kept here reaches the prompt in transformers too.
            return read_bytes(path, error=error).decode("utf-8")
        except UnicodeDecodeError as fault:
            raise error(f"{path}: is not UTF-8 text: byte {fault.start}") from fault

    def entry(name: str) -> Any:
        text = read(name)
        if text is None:
            return None
        document = parse_json(text.removeprefix("\ufeff"), str(folder / name), error=error)
        if not isinstance(document, dict):
            raise error(f"{folder / name}: holds no JSON object")
        return document.get("chat_template")

    def chosen(value: Any, name: str) -> ChatTemplate:
        return ChatTemplate(_default_template(value, folder / name, error), folder / name)

    value = entry("processor_config.json")
    if value is not None:
        return chosen(value, "processor_config.json")
    named = {
        path.stem: read(f"{_FOLDER}/{path.name}")
        for path in sorted((folder / _FOLDER).glob("*.jinja"))
    }
    value = entry("chat_template.json")
    if value is not None:
        if named:
            raise error(
                f"{folder}: has chat_template.json and {_FOLDER}/ both; transformers "
                f"refuses that, and so it is here: move the template to {TEMPLATE_FILE}"
            )
        return chosen(value, "chat_template.json")
    main = read(TEMPLATE_FILE)
    if main is not None:
        return ChatTemplate(main, folder / TEMPLATE_FILE)
    if named:
        return chosen(named, _FOLDER)
    value = entry("tokenizer_config.json")
    if value is not None:
        return chosen(value, "tokenizer_config.json")
    if default is not None:
        return ChatTemplate(default, folder / _BUILT_IN)
    raise error(f"{folder}: no chat template; expected {TEMPLATE_FILE}")


def _default_template(value: Any, where: Path, error: type[PocketVLMError]) -> str:
    """The template that is used if none is chosen by name."""
    if isinstance(value, list):
        try:
            value = {item["name"]: item["template"] for item in value}
        except (KeyError, TypeError) as fault:
            raise error(
                f"{where}: a list of chat templates must hold objects with name and template"
            ) from fault
    if isinstance(value, dict):
        if "default" not in value:
            names = ", ".join(sorted(map(str, value))) or "none"
            raise error(
                f"{where}: none of the chat templates is called default; there are: {names}"
            )
        value = value["default"]
    if not isinstance(value, str):
        raise error(f"{where}: chat_template must be text, or templates by name")
    return value
