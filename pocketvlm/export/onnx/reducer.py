"""Turns the checkpoint's token reducer into ONNX by tracing it: an exporter knows no method."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import onnx
import torch
from torch import Tensor, nn

from pocketvlm.errors import ExportError
from pocketvlm.models.reducer import ReducerInputs, TokenReducer
from pocketvlm.models.spec import ModelSpec

__all__ = ["trace_reducer"]


class _TracedReducer(nn.Module):
    """A reducer between the values that the vision graph has at hand."""

    def __init__(self, reducer: TokenReducer, spec: ModelSpec) -> None:
        super().__init__()
        self.reducer = reducer
        self._tower = spec.tower
        self._merge_factor = spec.projector.merge_factor

    def forward(self, features: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        heads, width = self._tower.heads, self._tower.head_dim
        shape = (1, queries.shape[1], heads, width)
        return self.reducer(
            ReducerInputs(
                features=features,
                queries=queries.view(shape).transpose(1, 2) * width**-0.5,
                keys=keys.view(shape).transpose(1, 2),
                has_cls=self._tower.has_cls,
                merge_factor=self._merge_factor,
            )
        )


def trace_reducer(reducer: TokenReducer, spec: ModelSpec, *, opset: int) -> onnx.ModelProto:
    """A token reducer as an ONNX model.

    Its inputs are `features` [1, N, C], `queries` and `keys` [1, tokens, hidden] of the feature
    block, its outputs `kept` [1, k, C] and `indices` [1, k].

    Args:
        reducer: Any reducer; it is traced as it is, with a batch of one.
        spec: The model it was made for.
        opset: Version of the standard operators.

    Raises:
        ExportError: An operator of the reducer cannot be converted; the message names it.
    """
    tower, factor = spec.tower, spec.projector.merge_factor
    tokens = tower.tokens
    generator = torch.Generator().manual_seed(0)
    example = tuple(
        torch.randn(shape, generator=generator)
        for shape in (
            (1, spec.visual_tokens, tower.hidden_size * factor**2),
            (1, tokens, tower.hidden_size),
            (1, tokens, tower.hidden_size),
        )
    )
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                _TracedReducer(reducer, spec).eval(),
                example,
                dynamo=True,
                opset_version=opset,
                input_names=["features", "queries", "keys"],
                output_names=["kept", "indices"],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ExportError(f"{type(reducer).__name__}: cannot become ONNX: {reason}") from error
    if program is None:
        raise ExportError(f"{type(reducer).__name__}: the ONNX exporter returned nothing")
    model = program.model_proto
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return model


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keeps the exporter's remarks on its own dependencies to itself; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level, said = logger.level, io.StringIO()
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
