"""Turns the checkpoint's token reducer into operators of a MIL program: no exporter knows a method.

The reducer computes in float32 whatever the graph does: float16 cannot tell indices beyond 2048
apart, nor scores that are nearly equal.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from typing import Any, Literal

import torch

from pocketvlm.errors import ExportError
from pocketvlm.export.coreml.limits import Deployment
from pocketvlm.models.reducer import TokenReducer
from pocketvlm.models.spec import ModelSpec
from pocketvlm.models.token_merging import TokenMerge
from pocketvlm.reference_graph.reducer_graph import MergeGraph, ReducerGraph

__all__ = ["convert_merge", "convert_program", "convert_reducer", "inline"]


def convert_reducer(reducer: TokenReducer, spec: ModelSpec, deployment: Deployment) -> Any:
    """A token reducer as a MIL program of one function, `main`.

    Its inputs are `features` [1, N, C], `queries` and `keys` [1, tokens, hidden] of the feature
    block, then those of earlier blocks as `ReducerGraph` takes them, its outputs the kept features
    [1, k, C] and their indices [1, k].

    Args:
        reducer: Any reducer; it is traced as it is, with a batch of one.
        spec: The model it was made for.
        deployment: The oldest system that has to run it.

    Raises:
        ExportError: An operator of the reducer cannot be converted; the message names it.
    """
    return _convert(ReducerGraph(reducer, spec), type(reducer).__name__, deployment)


def convert_merge(merge: TokenMerge, spec: ModelSpec, deployment: Deployment) -> Any:
    """A merge of tokens within the tower as a MIL program, with the values of `MergeGraph`.

    Args:
        merge: The rule.
        spec: The model, whose tower has it.
        deployment: The oldest system that has to run it.

    Raises:
        ExportError: An operator cannot be converted; the message names it.
    """
    return _convert(MergeGraph(merge, spec), merge.kind, deployment)


def _convert(graph: ReducerGraph | MergeGraph, name: str, deployment: Deployment) -> Any:
    try:
        program = torch.export.export(graph.eval(), graph.example())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ExportError(f"{name}: cannot be traced: {_one_line(error)}") from error
    return convert_program(name, program, deployment, precision="float32", convert_to="milinternal")


def convert_program(
    name: str,
    program: torch.export.ExportedProgram,
    deployment: Deployment,
    *,
    precision: Literal["float16", "float32"],
    convert_to: Literal["milinternal", "mlprogram"],
) -> Any:
    """A traced program by coremltools' own converter.

    Args:
        name: What it is, for the message.
        program: The program.
        deployment: The oldest system that has to run it.
        precision: What it computes in.
        convert_to: `milinternal` for a program of operators, `mlprogram` for a model.

    Raises:
        ExportError: An operator cannot be converted; the message names it.
    """
    import coremltools

    try:
        program = program.run_decompositions({})
        _drop_aliases(program.graph_module.graph)
        with redirect_stderr(io.StringIO()):  # progress bars
            return coremltools.convert(
                program,
                source="pytorch",
                convert_to=convert_to,
                compute_precision=coremltools.precision[precision.upper()],
                minimum_deployment_target=coremltools.target[deployment],
                # Only an Apple machine can compile a model.
                **({"skip_model_load": True} if convert_to == "mlprogram" else {}),
            )
    except (NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        raise ExportError(f"{name}: cannot become a Core ML program: {_one_line(error)}") from error


def inline(program: Any, inputs: Mapping[str, Any], prefix: str) -> tuple[Any, ...]:
    """Copies the operators of a program into the function under construction.

    Args:
        program: A program of one function without nested blocks.
        inputs: Values of this function by the names of the program's inputs.
        prefix: Put before every other name.

    Returns:
        Values of the program's outputs, in order.

    Raises:
        ExportError: An operator holds its own block.
    """
    from coremltools.converters.mil.mil import Builder

    (function,) = program.functions.values()
    values = {function.inputs[name]: value for name, value in inputs.items()}
    for operator in function.operations:
        label = f"{prefix}_{operator.name}"
        if operator.blocks:
            raise ExportError(f"{label}: branches and loops cannot be exported to Core ML")
        if operator.op_type == "const":
            made = Builder.const(val=operator.outputs[0].val, name=label)
        else:
            operands = {
                name: (
                    [values[item] for item in operand]
                    if isinstance(operand, list | tuple)
                    else values[operand]
                )
                for name, operand in operator.inputs.items()
            }
            made = getattr(Builder, operator.op_type)(**operands, name=label)
        results = made if isinstance(made, list | tuple) else (made,)
        values.update(zip(operator.outputs, results, strict=True))
    return tuple(values[output] for output in function.outputs)


def _drop_aliases(graph: torch.fx.Graph) -> None:
    """Takes out what returns its input, for which the toolkit has no operator."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
