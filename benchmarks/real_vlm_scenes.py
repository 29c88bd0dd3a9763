"""Scenes as sequences of SmolLM2's tokens, and a connector that begins by naming what they show.

A sequence holds one picture and as many questions about it as fit. Each sees the picture and
itself, and its tokens are those that the processor makes of it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from pocketvlm.reference.architecture import pixel_statistics
from pocketvlm.reference.dataset import ATTRIBUTES, patch_labels
from pocketvlm.reference.forward import normalise_pixels
from pocketvlm.reference.packing import IGNORED, choose_questions
from pocketvlm.reference.questions import sample_example_scene
from pocketvlm.reference.scenes import GRID, PATCH_GRID, Scene, render

__all__ = ["Batch", "Chat", "draw_batch", "draw_scenes", "name_cells", "pixels_of"]

_QUESTIONS = 24  # more than fit
_RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences, one per scene.

    Attributes:
        pixels: What the tower takes, [scenes, 3, height, width].
        tokens: Token ids, [scenes, length].
        targets: The next token where it belongs to an answer, `IGNORED` elsewhere, likewise.
        positions: Likewise.
        seen: Which tokens each one attends to, [scenes, 1, length, length].
    """

    pixels: Tensor
    tokens: Tensor
    targets: Tensor
    positions: Tensor
    seen: Tensor


class Chat:
    """How a question about a picture is written in tokens.

    Args:
        processor: Of the model.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self._tokenizer: Any = processor.tokenizer
        self.image_id = int(self._tokenizer.convert_tokens_to_ids("<image>"))
        self.end_id = int(self._tokenizer.eos_token_id)
        prompt = self.ask(processor, "")
        text = max(place for place, token in enumerate(prompt) if token == self.image_id) + 2
        self.prefix, self._reply = prompt[:text], prompt[text:]
        question = "is there a red circle?"
        whole = self.ask(processor, question)
        if [*self.prefix, *self._asked(question)] != whole:
            raise SystemExit("the processor does not write a question in tokens that stand alone")

    @staticmethod
    def ask(processor: ProcessorMixin, question: str) -> list[int]:
        """Token ids of one question about one picture, by the processor."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        picture = Image.new("RGB", (128, 128))
        ids: list[int] = processor(images=[[picture]], text=[text])["input_ids"][0]
        return list(ids)

    def word(self, text: str) -> list[int]:
        """Token ids of a word."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def turn(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a question, to where the answer begins, and of the answer with its end."""
        return self._asked(question), [*self.word(answer), self.end_id]

    def _asked(self, question: str) -> list[int]:
        return [*self.word(question), *self._reply]


def draw_scenes(seed: int, first: int, count: int) -> list[Scene]:
    """Training scenes by their numbers; none of them is asked about in an evaluation."""
    return [
        sample_example_scene(seed, number, split="train")[0]
        for number in range(first, first + count)
    ]


def pixels_of(scenes: Sequence[Scene]) -> Tensor:
    """Pictures as the tower of pocket-smol takes them, [scenes, 3, height, width]."""
    images = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))
    return normalise_pixels(images, *pixel_statistics("pocket-smol"))


def draw_batch(chat: Chat, seed: int, first: int, count: int, length: int) -> Batch:
    """Scenes with questions about them.

    Args:
        chat: How they are written.
        seed: Of the scenes.
        first: Number of the first scene.
        count: Scenes.
        length: Tokens of a sequence.
    """
    scenes = draw_scenes(seed, first, count)
    packs = [
        _pack(chat, scene, np.random.default_rng((seed, first + row)), length)
        for row, scene in enumerate(scenes)
    ]
    tokens, targets, segments, positions = torch.from_numpy(np.stack(packs)).unbind(1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    seen = causal & (same | (segments[:, None, :] == 0))
    return Batch(
        pixels=pixels_of(scenes),
        tokens=tokens,
        targets=targets,
        positions=positions,
        seen=seen[:, None],
    )


def _pack(chat: Chat, scene: Scene, rng: np.random.Generator, length: int) -> np.ndarray[Any, Any]:
    """Tokens, targets, segments and positions of one sequence, [4, length]."""
    begins = len(chat.prefix)
    rows = np.zeros((4, length), dtype=np.int64)
    tokens, targets, segments, positions = rows
    tokens[:begins], positions[:begins] = chat.prefix, np.arange(begins)
    targets[:] = IGNORED
    segments[begins:] = -1
    end, segment = begins, 0
    for question in choose_questions(scene, rng, _QUESTIONS):
        asked, answer = chat.turn(question.text, question.answer)
        stop = end + len(asked) + len(answer)
        if stop <= length:
            segment += 1
            tokens[end:stop] = [*asked, *answer]
            targets[end + len(asked) - 1 : stop - 1] = answer
            segments[end:stop] = segment
            positions[end:stop] = np.arange(begins, begins + stop - end)
            end = stop
    return rows


def name_cells(
    chat: Chat, features: Tensor, scenes: Sequence[Scene], table: Tensor
) -> tuple[Tensor, float]:
    """A connector whose tokens are the words for what a cell shows and where it lies.

    By least squares, without the decoder: training begins where pictures are words already.

    Args:
        chat: Finds words.
        features: The connector's inputs, [scenes, cells, inputs].
        scenes: What they show.
        table: Embedding of the decoder's words, [words, hidden].

    Returns:
        The connector's matrix, [hidden, inputs], and the share of the words' squares that it
        leaves.
    """
    vectors = torch.stack([_meaning(chat, table, name) for name in ATTRIBUTES])
    rows = _ends(chat, table, "top", "bottom")
    columns = _ends(chat, table, "left", "right")
    places = (rows[:, None] + columns[None]).flatten(0, 1)
    side = PATCH_GRID // GRID
    labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes])).float() / 255
    shown = labels.unflatten(1, (GRID, side, GRID, side)).amax(dim=(2, 4)).flatten(1, 2)
    wanted = (shown @ vectors + places).flatten(0, 1).double()
    inputs = features.flatten(0, 1).double()
    gram = inputs.T @ inputs
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    matrix = torch.linalg.solve(gram, inputs.T @ wanted)
    missed = (inputs @ matrix - wanted).square().sum() / wanted.square().sum()
    return matrix.T.float(), float(missed)


def _meaning(chat: Chat, table: Tensor, word: str) -> Tensor:
    return table[chat.word(f" {word}")].mean(dim=0)


def _ends(chat: Chat, table: Tensor, first: str, last: str) -> Tensor:
    """Places along one axis: from the word of one end to that of the other, [cells, hidden]."""
    share = torch.linspace(0, 1, GRID)[:, None]
    return (1 - share) * _meaning(chat, table, first) + share * _meaning(chat, table, last)
