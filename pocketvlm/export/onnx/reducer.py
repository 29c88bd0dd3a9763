"""Turns what chooses among visual tokens into ONNX by tracing it: an exporter knows no method."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import onnx
import torch

from pocketvlm.errors import ExportError
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.models.token_merging import TokenMerge
from pocketvlm.reference_graph.reducer_graph import MergeGraph, ReducerGraph

__all__ = ["trace_merge", "trace_reducer"]


def trace_reducer(reducer: TokenReducer, spec: ModelSpec, *, opset: int) -> onnx.ModelProto:
    """A token reducer as an ONNX model.

    Its inputs are `features` [1, N, C], `queries` and `keys` [1, tokens, hidden] of the feature
    block, then those of earlier blocks as `ReducerGraph` names them, its outputs `kept` [1, k, C]
    and `indices` [1, k].

    Args:
        reducer: Any reducer; it is traced as it is, with a batch of one.
        spec: The model it was made for.
        opset: Version of the standard operators.

    Raises:
        ExportError: An operator of the reducer cannot be converted; the message names it.
    """
    graph, name = ReducerGraph(reducer, spec), type(reducer).__name__
    return _trace(graph, name, ("kept", "indices"), opset)


def trace_merge(merge: TokenMerge, spec: ModelSpec, *, opset: int) -> onnx.ModelProto:
    """A merge of tokens within the tower as an ONNX model, with the values of `MergeGraph`.

    Args:
        merge: The rule.
        spec: The model, whose tower has it.
        opset: Version of the standard operators.

    Raises:
        ExportError: An operator cannot be converted; the message names it.
    """
    return _trace(
        MergeGraph(merge, spec), merge.kind, ("merged", "sizes_after", "places_after"), opset
    )


def _trace(
    graph: ReducerGraph | MergeGraph, name: str, outputs: Sequence[str], opset: int
) -> onnx.ModelProto:
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                graph.eval(),
                graph.example(),
                dynamo=True,
                opset_version=opset,
                input_names=list(graph.names),
                output_names=list(outputs),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ExportError(f"{name}: cannot become ONNX: {reason}") from error
    if program is None:
        raise ExportError(f"{name}: the ONNX exporter returned nothing")
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
