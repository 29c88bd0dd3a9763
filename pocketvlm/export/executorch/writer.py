"""From methods to the bytes of one program, and what XNNPACK took of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pocketvlm.errors import ExportError
from pocketvlm.export.executorch.layers import Kernels
from pocketvlm.export.executorch.methods import DecoderMethod, EmbeddingMethod, VisionMethod
from pocketvlm.export.executorch.schema import VisionPart, blank_picture
from pocketvlm.export.executorch.sharing import share_constants
from pocketvlm.runtime.executorch.program import register_operators

__all__ = ["Delegation", "LoweredProgram", "lower_program"]

_TRACED_LENGTH = 3  # any length above 1 will do; the dimension is dynamic


@dataclass(frozen=True, kw_only=True)
class Delegation:
    """How much of a method XNNPACK runs.

    Attributes:
        delegated: Operators inside delegates.
        delegates: Delegates.
        fallback: Operators outside of them, by name: ExecuTorch's own kernels run these.
    """

    delegated: int
    delegates: int
    fallback: Mapping[str, int]

    @property
    def share(self) -> float:
        """Share of operators that are delegated."""
        total = self.delegated + sum(self.fallback.values())
        return self.delegated / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """The delegation as JSON values."""
        return {**asdict(self), "share": round(self.share, 4)}


@dataclass(frozen=True, kw_only=True)
class LoweredProgram:
    """A program on its way to a file.

    Attributes:
        data: The file.
        delegation: By method.
        roundings: Layers whose scales the kernel stores with fewer digits, and how far off.
        dense: Compressed layers that are stored dense.
        shared_bytes: Bytes that two methods share beyond what their delegates do.
    """

    data: bytes
    delegation: Mapping[str, Delegation]
    roundings: Mapping[str, float]
    dense: tuple[str, ...]
    shared_bytes: int


def lower_program(
    model: nn.Module,
    visions: Sequence[VisionPart],
    *,
    capacity: int,
    constants: Mapping[str, Any],
    report: Callable[[str], None] = lambda _: None,
) -> LoweredProgram:
    """Traces and lowers the methods: one for each vision graph, token embedding, decoder.

    Args:
        model: The model.
        visions: Its vision methods; the decoder's rows are as the first one's.
        capacity: Rows of KV cache, and of the longest prompt.
        constants: Methods that return a constant, by name.
        report: Told what begins.

    Raises:
        UnsupportedError: A layer has a form without a kernel.
        ExportError: A method returns what is not a number.
    """
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig
    from executorch.exir import to_edge_transform_and_lower as lower

    register_operators()

    spec, reducer = visions[0].spec, visions[0].reducer
    pictures = {vision.method: blank_picture(vision.spec) for vision in visions}
    kernels = {name: Kernels(model) for name in (*pictures, "token_embedding", "text_decoder")}
    methods: dict[str, nn.Module] = {
        **{
            vision.method: VisionMethod(kernels[vision.method], vision.spec, vision.reducer)
            for vision in visions
        },
        "token_embedding": EmbeddingMethod(kernels["token_embedding"], spec, reducer),
        "text_decoder": DecoderMethod(kernels["text_decoder"], spec, reducer, capacity=capacity),
    }
    length = torch.export.Dim("length", min=1, max=capacity)
    programs = {}
    rows: Tensor | None = None
    for name, method in methods.items():
        report(name)
        inputs, dynamic = {
            **{method: ((pixels,), None) for method, pixels in pictures.items()},
            "token_embedding": (
                (torch.zeros(1, _TRACED_LENGTH, dtype=torch.int64),),
                ({1: length},),
            ),
            "text_decoder": ((rows, torch.zeros(1, dtype=torch.int64)), ({1: length}, None)),
        }[name]
        with torch.no_grad():
            # The first call makes the layers; what is traced then finds them.
            outputs = method.eval()(*inputs)
            _require_numbers(name, outputs)  # before lowering, which takes most of the time
            programs[name] = torch.export.export(
                method, inputs, dynamic_shapes=dynamic, strict=False
            )
        rows = outputs if name == "token_embedding" else rows
    report("xnnpack")
    edge = lower(
        programs,
        partitioner={name: [_partitioner()] for name in programs},
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
        constant_methods=dict(constants),
    )
    delegation = {name: _count_delegated(edge.exported_program(name)) for name in programs}
    data = edge.to_executorch(ExecutorchBackendConfig()).buffer
    shared = share_constants(data)
    return LoweredProgram(
        data=shared,
        delegation=delegation,
        roundings={k: v for layers in kernels.values() for k, v in layers.roundings.items()},
        dense=tuple(dict.fromkeys(name for layers in kernels.values() for name in layers.dense)),
        shared_bytes=len(data) - len(shared),
    )


def _require_numbers(name: str, outputs: Tensor | tuple[Tensor, ...]) -> None:
    rows = outputs if isinstance(outputs, Tensor) else outputs[0]
    if not bool(torch.isfinite(rows).all()):
        raise ExportError(f"executorch: {name} returns what is not a number")


def _partitioner() -> Any:
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import (
        CosConfig,
        SinConfig,
    )
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    # XNNPACK's cosine and sine lose digits at the large angles of late positions.
    left_out = (CosConfig, SinConfig)
    return XnnpackPartitioner(
        configs=[config for config in ALL_PARTITIONER_CONFIGS if config not in left_out]
    )


def _count_delegated(program: Any) -> Delegation:
    """Counts operators; what only moves values between them does not count."""
    from executorch.exir.lowered_backend_module import get_lowered_submodules

    lowered = [module for _, module, _ in get_lowered_submodules(program.graph_module)]
    inside = sum(1 for module in lowered for _ in _operators(module.original_module.graph_module))
    return Delegation(
        delegated=inside,
        delegates=len(lowered),
        fallback=dict(sorted(Counter(_operators(program.graph_module)).items())),
    )


_MOVES = ("getitem", "executorch_call_delegate", "alloc")


def _operators(graph_module: Any) -> Iterator[str]:
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            name = _operator_name(node)
            if name not in _MOVES:
                yield name


def _operator_name(node: Any) -> str:
    target = node.target
    if "auto_functionalized" in str(target):
        target = node.args[0]  # the operator that changes a buffer
    schema = getattr(target, "_schema", None)
    name = cast(
        "str", schema.name if schema is not None else getattr(target, "__name__", str(target))
    )
    return name.removeprefix("aten::")
