"""Trains the reference models: ``python -m pocketvlm.reference.train STAGE --work FOLDER``.

The stages in order, each resumable (run the same command again) and each reading what the one
before left in the work folder:

```text
data                     renders, labels and packs the training scenes
decoder                  pretrains the decoder that both models share
tower MODEL              trains tower and projector of one model
joint MODEL              trains the whole model, then writes it to FOLDER/MODEL
```
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pocketvlm.reference import REFERENCE_MODELS
from pocketvlm.reference.architecture import build_processor, generation_config
from pocketvlm.reference.dataset import SHARD_SIZE, load_shard, make_shard
from pocketvlm.reference.stages import Batch, DecoderStage, JointStage, Loss, Stage, TowerStage

__all__ = ["learning_rate", "main", "make_optimizer", "save_model", "save_state", "take_step"]

_WARMUP_STEPS = 100
_DECAY_SHARE = 0.3
_FINAL_RATE = 0.02
_PRINT_EVERY = 50
_SAVE_EVERY = 250
_HELD_OUT_ROWS = 256


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, plateau, linear decay: a run can be extended until its decay begins."""
    remaining = 1 - step / steps
    return min(1.0, (step + 1) / _WARMUP_STEPS, max(_FINAL_RATE, remaining / _DECAY_SHARE))


def make_optimizer(module: nn.Module, rates: Mapping[str, float], peak: float) -> torch.optim.AdamW:
    """AdamW without decay of norms and biases; a parameter's rate is that of its first prefix.

    Args:
        module: What is trained, of which only parameters that want gradients count.
        rates: Shares of the rate by prefixes of names.
        peak: The rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            share = next(rate for prefix, rate in rates.items() if name.startswith(prefix))
            decay = 0.05 if parameter.dim() > 1 else 0.0
            groups.setdefault((share, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": peak * share, "peak": peak * share, "weight_decay": decay}
            for (share, decay), parameters in groups.items()
        ],
        betas=(0.9, 0.95),
        fused=True,
    )


def take_step(
    optimizer: torch.optim.AdamW, loss: Tensor, step: int, steps: int, *, name: str
) -> float:
    """One step down a loss; returns the length of its gradient.

    Raises:
        FloatingPointError: The gradient is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * learning_rate(step, steps)
    optimizer.zero_grad()
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(trained, 1.0))
    if not math.isfinite(norm):
        raise FloatingPointError(f"{name}: the gradient at step {step} is {norm}")
    optimizer.step()
    return norm


def save_state(file: Path, state: Mapping[str, Any]) -> None:
    """Writes where a run stands, aside first and then in one move."""
    aside = file.with_suffix(".tmp")
    torch.save(dict(state), aside)
    aside.rename(file)


def _train(stage: Stage, options: argparse.Namespace, name: str) -> None:
    """Runs a stage to its last step, from its last checkpoint if there is one."""
    checkpoint = options.work / f"{name}.pt"
    optimizer = make_optimizer(stage.module, stage.rates, options.rate)
    step, seconds = 0, 0.0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        stage.module.load_state_dict(state["module"])
        step, seconds = state["step"], state["seconds"]
        if step < options.steps:
            optimizer.load_state_dict(state["optimizer"])
    per_shard = SHARD_SIZE // options.batch
    held_out = load_shard(make_shard(options.work, options.seed, options.shards))
    shard_number, shard = -1, held_out
    started, printed = time.perf_counter() - seconds, time.perf_counter()
    while step < options.steps:
        epoch_shard, row = divmod(step, per_shard)
        if epoch_shard != shard_number:
            shard_number = epoch_shard
            shard = load_shard(
                make_shard(options.work, options.seed, shard_number % options.shards)
            )
            order = np.random.default_rng((options.seed, shard_number)).permutation(SHARD_SIZE)
        rows = order[row * options.batch : (row + 1) * options.batch]
        loss = _loss(stage, Batch.from_shard(shard, rows, stage.dialect(step)), training=True)
        norm = take_step(optimizer, loss.total, step, options.steps, name=name)
        step += 1
        if step % _PRINT_EVERY == 0:
            speed = _PRINT_EVERY * options.batch / (time.perf_counter() - printed)
            print(
                f"{name} {step} {_show(loss.figures)} norm {norm:.2f} scenes/s {speed:.0f}",
                flush=True,
            )
            printed = time.perf_counter()
        if step % _SAVE_EVERY == 0 or step == options.steps:
            seconds = time.perf_counter() - started
            state = {"module": stage.module.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(checkpoint, {**state, "step": step, "seconds": seconds})
            figures = _held_out(stage, held_out, options.batch)
            print(f"{name} {step} held out: {_show(figures)} after {seconds:.0f} s", flush=True)
            printed = time.perf_counter()


def _loss(stage: Stage, batch: Batch, *, training: bool) -> Loss:
    with torch.autocast("cpu", torch.bfloat16):
        return stage.loss(batch, training=training)


def _held_out(stage: Stage, shard: Any, size: int) -> dict[str, float]:
    """Mean figures on scenes that training never sees."""
    rows = np.arange(_HELD_OUT_ROWS).reshape(-1, size)
    with torch.no_grad():
        batches = [Batch.from_shard(shard, chunk, stage.dialect(i)) for i, chunk in enumerate(rows)]
        figures = [_loss(stage, batch, training=False).figures for batch in batches]
    return {key: float(np.mean([f[key] for f in figures])) for key in figures[0]}


def _show(figures: dict[str, float]) -> str:
    return " ".join(f"{key} {value:.4f}" for key, value in figures.items())


def save_model(model: Any, name: str, folder: Path) -> None:
    """Writes model and processor in bfloat16, aside first and then in one move."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.generation_config = generation_config()
    model.to(torch.bfloat16).save_pretrained(aside)
    build_processor(name).save_pretrained(aside)
    for path in aside.iterdir():
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _decoder_stage(options: argparse.Namespace) -> DecoderStage:
    torch.manual_seed(options.seed)
    return DecoderStage(oracle_rate=getattr(options, "oracle_rate", 0.3))


def _tower_stage(options: argparse.Namespace) -> TowerStage:
    pretrained = _decoder_stage(options)
    _restore(pretrained, options.work / "decoder.pt")
    return TowerStage(options.model, pretrained.oracle, pretrained.decoder)


def _joint_stage(options: argparse.Namespace) -> JointStage:
    pretrained = _decoder_stage(options)
    _restore(pretrained, options.work / "decoder.pt")
    tower = TowerStage(options.model, pretrained.oracle, pretrained.decoder)
    _restore(tower, options.work / f"{options.model}-tower.pt")
    return JointStage(tower, pretrained.decoder)


def _restore(stage: Stage, checkpoint: Path) -> None:
    if not checkpoint.exists():
        raise SystemExit(f"{checkpoint} is missing: run the stage before this one first")
    stage.module.load_state_dict(torch.load(checkpoint, weights_only=True)["module"])


def _parse() -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--work", type=Path, required=True, help="folder of data and checkpoints")
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument("--threads", type=int, default=2)
    shared.add_argument("--shards", type=int, default=39, help=f"training scenes, in {SHARD_SIZE}s")
    parser = argparse.ArgumentParser(prog="pocketvlm.reference.train", description=__doc__)
    commands = parser.add_subparsers(dest="stage", required=True)
    commands.add_parser("data", parents=[shared])
    for stage, steps, rate in (
        ("decoder", 2000, 2e-3),
        ("tower", 1500, 2e-3),
        ("joint", 1500, 5e-4),
    ):
        command = commands.add_parser(stage, parents=[shared])
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--rate", type=float, default=rate)
        command.add_argument("--batch", type=int, default=16)
        if stage == "decoder":
            command.add_argument("--oracle-rate", type=float, default=0.3)
        else:
            command.add_argument("model", choices=REFERENCE_MODELS)
    return parser.parse_args()


def main() -> None:
    """Runs one stage."""
    options = _parse()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    if options.stage == "data":
        with ProcessPoolExecutor(options.threads) as pool:
            for path in pool.map(
                partial(make_shard, options.work, options.seed), range(options.shards + 1)
            ):
                print(path, flush=True)
    elif options.stage == "decoder":
        _train(_decoder_stage(options), options, "decoder")
    elif options.stage == "tower":
        _train(_tower_stage(options), options, f"{options.model}-tower")
    else:
        stage = _joint_stage(options)
        _train(stage, options, f"{options.model}-joint")
        save_model(stage.model, options.model, options.work / options.model)


if __name__ == "__main__":
    main()
