"""The three stages of training, each as a loss over a batch of scenes.

1. ``DecoderStage``: the decoder learns to answer about scenes that an oracle shows it as symbols.
2. ``TowerStage``: tower and projector learn to say of pixels what the oracle says of symbols.
   A CLS token is also asked what the scene contains, so its attention has to find the objects.
3. ``JointStage``: everything learns together from the answers alone, plus the CLS question.

No stage drops visual tokens: the models are ordinary, and token reduction is measured, not trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from pocketvlm.reference.architecture import build_model, decoder_config, pixel_statistics
from pocketvlm.reference.dataset import ATTRIBUTES, CONTENT_SIZE, Shard
from pocketvlm.reference.forward import Vision, decode_packed, look, normalise_pixels, packed_bias
from pocketvlm.reference.oracle import Oracle, initialise_decoder
from pocketvlm.reference.packing import IGNORED, image_span
from pocketvlm.reference.scenes import COLORS, SHAPES, SIZES, WORDS
from pocketvlm.reference.tokenizer import EOS_ID, SCENE_DIALECTS, VOCABULARY_SIZE, build_tokenizer

__all__ = ["Batch", "DecoderStage", "JointStage", "Loss", "Stage", "TowerStage"]

_ORACLE_NOISE = 0.04  # half the spread of a word's first embedding: a real tower errs too


_DECISIVENESS = 8.0  # logits per unit of an attribute that is read back


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of a shard as tensors, with their packs in one dialect."""

    dialect: str
    images: Tensor
    labels: Tensor
    contents: Tensor
    tokens: Tensor
    targets: Tensor
    segments: Tensor
    positions: Tensor

    @classmethod
    def from_shard(cls, shard: Shard, rows: NDArray[np.int64], dialect: str) -> Batch:
        """Takes rows of a shard."""
        packs = torch.from_numpy(shard.packs[dialect][rows]).long()
        tokens, targets, segments, positions = packs.unbind(1)
        return cls(
            dialect=dialect,
            images=torch.from_numpy(shard.images[rows]),
            labels=torch.from_numpy(shard.labels[rows]).float() / 255,
            contents=torch.from_numpy(shard.contents[rows]).float(),
            tokens=tokens,
            targets=targets,
            segments=segments,
            positions=positions,
        )


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss to minimise and what to print about it."""

    total: Tensor
    figures: dict[str, float]


class Stage(Protocol):
    """What the training loop needs of a stage."""

    module: nn.Module
    rates: dict[str, float]

    def dialect(self, step: int) -> str:
        """Which dialect the batch of a step is written in."""
        ...

    def loss(self, batch: Batch, *, training: bool) -> Loss:
        """Computes the loss of a batch."""
        ...


class _Answers:
    """The answer loss of a decoder on packed sequences, compiled once."""

    def __init__(self, decoder: Any, head: nn.Linear) -> None:
        self._decoder, self._head = decoder, head
        self._weights = _answer_weights()
        self._run: Callable[..., Tensor] = torch.compile(decode_packed, dynamic=False)

    def __call__(self, batch: Batch, visual: Tensor) -> Loss:
        embedded = self._decoder.embed_tokens(batch.tokens)
        span = image_span(batch.dialect)
        states = torch.cat(
            [embedded[:, : span.start], visual.float(), embedded[:, span.stop :]], dim=1
        )
        cos, sin = self._decoder.rotary_emb(states, batch.positions)
        states = self._run(self._decoder, states, packed_bias(batch.segments), cos, sin)
        asked = batch.targets != IGNORED
        logits = self._head(states[asked]).float()
        expected = batch.targets[asked]
        total = F.cross_entropy(logits, expected, self._weights)
        right = (logits.argmax(-1) == expected).float().mean()
        return Loss(total=total, figures={"answers": float(total.detach()), "right": float(right)})


def _answer_weights() -> Tensor:
    """Weights of the answer tokens: rare and slow ones count more, the certain end of turn less."""
    weights = torch.ones(VOCABULARY_SIZE)
    weights[EOS_ID] = 0.1
    tokenizer = build_tokenizer("pocket-llava")
    for answers, weight in ((WORDS, 5.0), (("left", "right", " left", " right"), 2.0)):
        for answer in answers:
            weights[tokenizer(answer)["input_ids"]] = weight
    return weights


class DecoderStage:
    """Pretrains the decoder, in both dialects by turns, on what an oracle sees."""

    def __init__(self, *, oracle_rate: float = 0.3) -> None:
        """Builds the stage.

        Args:
            oracle_rate: Learning rate of the oracle's vectors, as a share of the decoder's.
        """
        self.decoder = LlamaForCausalLM(decoder_config())
        initialise_decoder(self.decoder)
        self.oracle = Oracle(self.decoder.model.embed_tokens.weight)
        self.module: nn.Module = nn.ModuleDict({"decoder": self.decoder, "oracle": self.oracle})
        # Slow vectors: what an attribute shows and the word that asks for it should stay alike.
        self.rates = {"decoder.model.embed_tokens": 0.3, "oracle": oracle_rate, "": 1.0}
        self._answers = _Answers(self.decoder.model, self.decoder.lm_head)

    def dialect(self, step: int) -> str:
        """Alternates between the dialects."""
        return tuple(SCENE_DIALECTS)[step % len(SCENE_DIALECTS)]

    def loss(self, batch: Batch, *, training: bool) -> Loss:
        """Answer loss on noisy oracle tokens."""
        visual = self.oracle(batch.labels)
        if training:
            visual = visual + _ORACLE_NOISE * torch.randn_like(visual)
        return self._answers(batch, visual)


class TowerStage:
    """Teaches tower and projector to speak the oracle's language."""

    def __init__(self, name: str, oracle: Oracle, decoder: LlamaForCausalLM) -> None:
        self.name = name
        self.model = build_model(name)
        _implant(self.model, decoder)
        vision = [p for n, p in self.model.named_parameters() if _is_vision(n)]
        self.content_heads = nn.ModuleList()
        if name == "pocket-llava":
            width = self.model.config.vision_config.hidden_size
            self.content_heads.extend(nn.Linear(width, CONTENT_SIZE) for _ in range(2))
        self.oracle = oracle.requires_grad_(requires_grad=False)
        self.module: nn.Module = nn.ModuleDict(
            {"model": self.model, "content_heads": self.content_heads}
        )
        for parameter in self.model.parameters():
            parameter.requires_grad_(requires_grad=False)
        for parameter in vision:
            parameter.requires_grad_(requires_grad=True)
        self.rates = {"": 1.0}
        self._look = _compiled_look(self.model)
        self._statistics = pixel_statistics(name)
        # Attributes read back from a token all weigh the same, however small their vectors are.
        self._readout = torch.linalg.pinv(oracle.attributes.detach())

    def dialect(self, step: int) -> str:
        """The model's own."""
        return self.name

    def loss(self, batch: Batch, *, training: bool) -> Loss:
        """Distance to the oracle's tokens, in their space and in the space of attributes."""
        vision = self._look(self.model, normalise_pixels(batch.images, *self._statistics))
        target = self.oracle(batch.labels)
        gap = vision.tokens.float() - target
        distance = gap.square().mean() / target.var(dim=(0, 1)).mean()
        errors = gap @ self._readout
        read = errors.square().sum(-1).mean() / batch.labels.square().sum(-1).mean()
        choice = _choice_loss(batch.labels + errors, batch.labels)
        total = distance + read + choice
        figures = {
            "distance": float(distance.detach()),
            "read": float(read.detach()),
            "choice": float(choice.detach()),
        }
        if vision.summaries:
            content = content_loss(self.content_heads, vision, batch.contents)
            figures["content"] = float(content.detach())
            total = total + content
        return Loss(total=total, figures=figures)


def _choice_loss(read: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of which colour, shape, size and word a covered patch shows.

    The distances above are content with a blur of two similar words; this asks for a decision.
    """
    total = read.new_zeros(())
    for names in (tuple(COLORS), SHAPES, SIZES, WORDS):
        start = ATTRIBUTES.index(names[0])
        shown = labels[..., start : start + len(names)]
        covered = shown.amax(-1) > 0.5
        logits = _DECISIVENESS * read[..., start : start + len(names)][covered]
        total = total + F.cross_entropy(logits, shown[covered].argmax(-1))
    return total


def content_loss(heads: nn.ModuleList, vision: Vision, contents: Tensor) -> Tensor:
    """How badly the summaries of an image tell what is in it (zero for a tower without CLS)."""
    total = vision.tokens.new_zeros((), dtype=torch.float32)
    for head, summary in zip(heads, vision.summaries, strict=True):
        total = total + F.binary_cross_entropy_with_logits(head(summary).float(), contents)
    return 4 * total


class JointStage:
    """Trains the whole model end to end on its answers."""

    def __init__(self, tower: TowerStage, decoder: LlamaForCausalLM) -> None:
        """Joins a trained tower and a pretrained decoder, which may be newer than the tower."""
        _implant(tower.model, decoder)
        self.name, self.model, self.content_heads = tower.name, tower.model, tower.content_heads
        self.module = tower.module
        for parameter in self.model.parameters():
            parameter.requires_grad_(requires_grad=True)
        self.rates = {"model.model.vision": 0.6, "": 1.0}
        self._look = _compiled_look(self.model)
        self._statistics = pixel_statistics(self.name)
        decoder = (
            self.model.model.language_model
            if self.name == "pocket-llava"
            else self.model.model.text_model
        )
        self._answers = _Answers(decoder, self.model.lm_head)

    def dialect(self, step: int) -> str:
        """The model's own."""
        return self.name

    def loss(self, batch: Batch, *, training: bool) -> Loss:
        """Answer loss, plus what CLS says about the scene."""
        vision = self._look(self.model, normalise_pixels(batch.images, *self._statistics))
        answers = self._answers(batch, vision.tokens)
        if not vision.summaries:
            return answers
        content = content_loss(self.content_heads, vision, batch.contents)
        return Loss(
            total=answers.total + 0.3 * content,
            figures={**answers.figures, "content": float(content.detach())},
        )


def _compiled_look(model: PreTrainedModel) -> Callable[[PreTrainedModel, Tensor], Vision]:
    model.set_attn_implementation("eager")  # what the compiler fuses best at these lengths
    compiled: Callable[[PreTrainedModel, Tensor], Vision] = torch.compile(look, dynamic=False)
    return compiled


def _is_vision(name: str) -> bool:
    return "vision_" in name or "projector" in name or "connector" in name


def _implant(model: PreTrainedModel, decoder: LlamaForCausalLM) -> None:
    """Puts a pretrained decoder into a vision-language model."""
    _text_model(model).load_state_dict(decoder.model.state_dict())
    model.tie_weights()


def _text_model(model: PreTrainedModel) -> nn.Module:
    core = model.model
    return core.language_model if hasattr(core, "language_model") else core.text_model
