"""The conversation that a sample asks for: the same for a checkpoint and for a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketvlm.calibration.source import Sample

__all__ = ["prompt_messages"]


def prompt_messages(sample: Sample) -> list[dict[str, Any]]:
    """The conversation up to the question; the picture belongs to the user's first turn."""
    messages: list[dict[str, Any]] = []
    has_image = sample.image is not None
    for role, text in sample.turns:
        content: list[dict[str, str]] = [{"type": "text", "text": text}]
        if role == "user" and has_image:
            content.insert(0, {"type": "image"})
            has_image = False
        messages.append({"role": role, "content": content})
    return messages
