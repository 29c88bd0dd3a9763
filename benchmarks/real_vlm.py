"""A vision-language model on a real decoder: trained on the scenes, by one command.

    PYTHONPATH=.:DIR python benchmarks/real_vlm.py --work WORK --threads 2

DIR holds `requirements/real_decoder.txt`, as for `real_decoder.py`. The model is that of
`real_decoder_checkpoint`: SmolLM2-135M-Instruct with the tower of `pocket-smol`, 16 visual tokens.
The connector begins by naming what a cell shows (`real_vlm_scenes`). Then tower and connector learn
from answers with the decoder frozen, and after that the decoder takes a low-rank update too, which
is merged at the end. Killed, the command resumes at its last saved step. It leaves WORK/model and
prints what it answers, as `python -m pocketvlm.reference.evaluate` does.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from low_rank import merge, widen
from real_decoder_checkpoint import ensure_checkpoint
from real_vlm_scenes import Batch, Chat, draw_batch, draw_scenes, name_cells, pixels_of
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoProcessor

from pocketvlm.processor.foreign_code import STOCK_ONLY
from pocketvlm.reference.evaluate import score_model
from pocketvlm.reference.forward import look
from pocketvlm.reference.packing import IGNORED
from pocketvlm.reference.questions import generate_examples
from pocketvlm.reference.train import save_state

_LENGTH = 256  # tokens of a sequence: about 14 questions
_NAMED = 1024  # scenes that the connector begins with
_RATES = {"tower": 1e-4, "connector": 2e-4, "update": 1e-3}
_WARMUP_STEPS = 10
_LAST_RATE = 0.05
_END_WEIGHT = 0.1  # of the token that ends an answer, which is easy
_PRINT_EVERY, _SAVE_EVERY = 5, 20
_HELD_OUT = 1_000_000  # number of the first scene that judges


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long training is.

    Attributes:
        frozen: Steps of tower and connector alone.
        steps: All steps.
        scenes: Of a step.
        rank: Of the decoder's update.
        seed: Of everything.
    """

    frozen: int
    steps: int
    scenes: int
    rank: int
    seed: int


class Trainer:
    """Model, optimizer and where a run stands.

    Args:
        start: Folder of the model that training begins with.
        plan: How long training is.
    """

    def __init__(self, start: Path, plan: Plan) -> None:
        self.plan, self.step, self.seconds = plan, 0, 0.0
        torch.manual_seed(plan.seed)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            start, dtype=torch.float32, attn_implementation="sdpa", **STOCK_ONLY
        )
        self.processor = AutoProcessor.from_pretrained(start, **STOCK_ONLY)
        self.chat = Chat(self.processor)
        self.model.requires_grad_(requires_grad=False)
        core = self.model.model
        core.vision_model.requires_grad_(requires_grad=True)
        core.connector.requires_grad_(requires_grad=True)
        self.parts: dict[str, list[nn.Parameter]] = {
            "tower": list(core.vision_model.parameters()),
            "connector": list(core.connector.parameters()),
            "update": widen(core.text_model, plan.rank),
        }
        self.optimizer = torch.optim.AdamW(
            [{"params": found, "part": part, "lr": 0.0} for part, found in self.parts.items()],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )

    def name_cells(self) -> float:
        """Sets the connector by least squares; returns the share of the words that it misses."""
        core = self.model.model
        seen: list[Tensor] = []
        projection = core.connector.modality_projection.proj
        hook = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        scenes = draw_scenes(self.plan.seed, _HELD_OUT * 2, _NAMED)
        with torch.no_grad():
            for first in range(0, _NAMED, 64):
                look(self.model, pixels_of(scenes[first : first + 64]))
            hook.remove()
            table = core.text_model.embed_tokens.weight
            matrix, missed = name_cells(self.chat, torch.cat(seen), scenes, table)
            projection.weight.copy_(matrix)
        return missed

    def train(self, file: Path) -> None:
        """Runs to the last step, from where the file says that the run stands."""
        if file.exists():
            self._restore(torch.load(file, weights_only=True))
        elif not self.step:
            print(f"connector: misses {self.name_cells():.3f} of the words", flush=True)
            self._judge()
        started, plan = time.process_time() - self.seconds, self.plan
        while self.step < plan.steps:
            first = self.step * plan.scenes
            batch = draw_batch(self.chat, plan.seed, first, plan.scenes, _LENGTH)
            for group in self.optimizer.param_groups:
                group["lr"] = _RATES[group["part"]] * self._share(group["part"])
            self.optimizer.zero_grad()
            loss, right = self._loss(batch)
            loss.backward()
            trained = [p for found in self.parts.values() for p in found if p.grad is not None]
            norm = float(nn.utils.clip_grad_norm_(trained, 1.0))
            if not math.isfinite(norm):
                raise FloatingPointError(f"the gradient at step {self.step} is {norm}")
            self.optimizer.step()
            self.step += 1
            self.seconds = time.process_time() - started
            if self.step % _PRINT_EVERY == 0:
                print(
                    f"{self.step} loss {float(loss.detach()):.3f} right {right:.3f} "
                    f"norm {norm:.2f} after {self.seconds:.0f} s of processors",
                    flush=True,
                )
            if self.step % _SAVE_EVERY == 0 or self.step == plan.steps:
                self._save(file)
                self._judge()

    def _share(self, part: str) -> float:
        """Of a part's rate: up, then down as a cosine does; updates begin with the decoder."""
        begins = self.plan.frozen if part == "update" else 0
        done = self.step - begins
        if done < 0:
            return 0.0
        progress = done / (self.plan.steps - begins)
        cosine = _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
        return min(1.0, (done + 1) / _WARMUP_STEPS) * cosine

    def _loss(self, batch: Batch) -> tuple[Tensor, float]:
        """Cross-entropy of the answers' tokens, and the share of them that would be said."""
        core = self.model.model
        for parameter in self.parts["update"]:
            parameter.requires_grad = self.step >= self.plan.frozen
        states = core.text_model.embed_tokens(batch.tokens)
        visual = look(self.model, batch.pixels).tokens
        places = batch.tokens == self.chat.image_id
        states = states.masked_scatter(places[..., None], visual)
        states = core.text_model(
            inputs_embeds=states,
            attention_mask=batch.seen,
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        asked = batch.targets != IGNORED
        logits, expected = self.model.lm_head(states[asked]), batch.targets[asked]
        weights = torch.where(expected == self.chat.end_id, _END_WEIGHT, 1.0)
        losses = functional.cross_entropy(logits, expected, reduction="none")
        words = expected != self.chat.end_id
        right = (logits.argmax(dim=-1) == expected)[words].float().mean()
        return (losses * weights).sum() / weights.sum(), float(right)

    @torch.no_grad()
    def _judge(self) -> None:
        batch = draw_batch(self.chat, self.plan.seed, _HELD_OUT, 8, _LENGTH)
        loss, right = self._loss(batch)
        print(
            f"{self.step} held out: loss {float(loss):.3f}, "
            f"{right:.3f} of the answers' tokens right, after {self.seconds:.0f} s",
            flush=True,
        )

    def _save(self, file: Path) -> None:
        state = {
            "parts": {part: [p.detach() for p in found] for part, found in self.parts.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        save_state(file, state)

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        for part, values in state["parts"].items():
            for parameter, value in zip(self.parts[part], values, strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="Model, and where a run stands.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--frozen", type=int, default=60, help="Steps with the decoder frozen.")
    parser.add_argument("--steps", type=int, default=400, help="All steps.")
    parser.add_argument("--scenes", type=int, default=4, help="Of a step.")
    parser.add_argument("--rank", type=int, default=16, help="Of the decoder's update.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=400, help="That it is judged on.")
    arguments = parser.parse_args()
    if not 0 <= arguments.frozen < arguments.steps:
        parser.error(f"--frozen {arguments.frozen}: must be below --steps {arguments.steps}")
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    start = ensure_checkpoint(work / "start")
    plan = Plan(
        frozen=arguments.frozen,
        steps=arguments.steps,
        scenes=arguments.scenes,
        rank=arguments.rank,
        seed=arguments.seed,
    )
    trainer = Trainer(start, plan)
    trainer.train(work / "training.pt")
    merge(trainer.model)
    model = trainer.model.eval()
    model.generation_config.max_new_tokens = 8
    model.generation_config.do_sample = False
    shutil.rmtree(work / "model", ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(work / "model")
    trainer.processor.save_pretrained(work / "model")
    model.to(torch.float32)
    trainer.processor.tokenizer.padding_side = "left"
    for blind in (False, True):
        examples = generate_examples(0, arguments.questions)
        score = score_model(model, trainer.processor, examples, blind=blind, batch_size=32)
        kinds = ", ".join(f"{kind} {score.of(kind):.3f}" for kind in score.asked)
        print(
            f"{'blind' if blind else 'answers'}: {score.accuracy:.3f} of {score.n} ({kinds})",
            flush=True,
        )


if __name__ == "__main__":
    main()
