"""Builds the stock model of a config.json, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pocketvlm.checkpoint.config import parse_config
from pocketvlm.errors import CheckpointError
from pocketvlm.processor.foreign_code import ATTENTION

__all__ = ["build_model", "build_skeleton"]


class _MatricesOnMeta(TorchFunctionMode):
    """Allocates vectors and buffers, but not matrices, which are loaded one by one."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            shape = args[0] if args and isinstance(args[0], tuple | list) else args
            if len(shape) > 1:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """The stock model of a config.json, in float32, with its weight matrices on the meta device.

    Raises:
        CheckpointError: The config cannot be understood.
    """
    from transformers.initialization import no_init_weights

    with _MatricesOnMeta(), no_init_weights():
        model: nn.Module = _stock_model(config)
    model.requires_grad_(requires_grad=False)
    return model.eval()


def build_skeleton(config: Mapping[str, Any]) -> Any:
    """The same model on the meta device: which weights it has, and their names.

    Raises:
        CheckpointError: The config cannot be understood.
    """
    with torch.device("meta"):
        return _stock_model(config)


def _stock_model(config: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForImageTextToText

    parsed = parse_config(config)
    try:
        return AutoModelForImageTextToText.from_config(
            parsed, dtype=torch.float32, attn_implementation=ATTENTION, trust_remote_code=False
        )
    except Exception as error:  # modules assert, divide by and look up values of the config
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"config.json: no model can be built from it: {words}") from error
