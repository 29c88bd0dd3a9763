"""Reads a package back with the format's own schema, and runs it in the reference evaluator."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.context import RunContext
from pocketvlm.emulation.mil.package import MilPackage
from pocketvlm.emulation.mil.program import MilProgram
from pocketvlm.export.coreml.target import ToCoreml

_ROOT = Path("Data") / "com.apple.CoreML"
_PACKED_BITS = {"UINT1": 1, "UINT2": 2, "UINT3": 3, "UINT4": 4, "INT4": 4, "UINT6": 6}
_PLAIN = {
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "UINT32": np.uint32,
}


class PackageContent:
    """Every operator of a package, and every array of its weight file."""

    def __init__(self, path: Path) -> None:
        from coremltools.proto import MIL_pb2, Model_pb2

        self._types = MIL_pb2.DataType
        self.spec = Model_pb2.Model()
        self.spec.ParseFromString((path / _ROOT / "model.mlmodel").read_bytes())
        self.weights = (path / _ROOT / "weights" / "weight.bin").read_bytes()
        self.functions: dict[str, dict[str, Any]] = {}
        self._makers: dict[str, dict[str, Any]] = {}
        for name, function in self.spec.mlProgram.functions.items():
            block = function.block_specializations[function.opset]
            self.functions[name] = {
                operation.outputs[0].name: operation
                for operation in block.operations
                if operation.outputs
            }
            self._makers[name] = {
                output.name: operation
                for operation in block.operations
                for output in operation.outputs
            }

    def operand(self, function: str, operation: Any, parameter: str) -> Any:
        """An array, or the operation that makes it."""
        held = operation.inputs if parameter in operation.inputs else operation.attributes
        if held is operation.attributes:
            return self.array(held[parameter])
        (binding,) = held[parameter].arguments
        if binding.HasField("value"):
            return self.array(binding.value)
        made = self._makers[function][binding.name]
        return self.array(made.attributes["val"]) if made.type == "const" else made

    def array(self, value: Any) -> np.ndarray:
        kind = self._types.Name(value.type.tensorType.dataType)
        shape = [size.constant.size for size in value.type.tensorType.dimensions]
        count = int(np.prod(shape))
        if value.HasField("immediateValue"):
            tensor = value.immediateValue.tensor
            field = tensor.WhichOneof("value")
            content = getattr(tensor, field).values
            if field == "bytes":
                return self._decode(kind, content, count).reshape(shape)
            return np.array(content).reshape(shape)
        return self._decode(kind, self.blob(value.blobFileValue.offset), count).reshape(shape)

    def blob(self, place: int) -> bytes:
        """The bytes of an array, from where its record lies."""
        sentinel, _, size, start = struct.unpack_from("<IIQQ", self.weights, place)
        assert sentinel == 0xDEADBEEF
        return self.weights[start : start + size]

    def places(self, function: str) -> list[int]:
        """Where the arrays that a function refers to lie, in order of use."""
        found = []
        for operation in self.functions[function].values():
            values = list(operation.attributes.values())
            values += [
                binding.value
                for argument in operation.inputs.values()
                for binding in argument.arguments
                if binding.HasField("value")
            ]
            found += [v.blobFileValue.offset for v in values if v.HasField("blobFileValue")]
        return found

    def _decode(self, kind: str, content: bytes, count: int) -> np.ndarray:
        if kind not in _PACKED_BITS:
            return np.frombuffer(content, _PLAIN[kind], count)
        bits, codes = _PACKED_BITS[kind], np.zeros(count, np.int64)
        stream = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
        for bit in range(bits):
            codes |= stream[bit : count * bits : bits].astype(np.int64) << bit
        return np.where(codes >= 8, codes - 16, codes) if kind == "INT4" else codes


def export(checkpoint: Checkpoint, folder: Path, **options: Any) -> Path:
    """Packages of a tiny cache and tiny chunks; returns their folder."""
    options = {"context": 64, "chunk": 8} | options
    ToCoreml(**options).export(checkpoint, folder, RunContext())
    return folder / "coreml"


class Decoder:
    """The decoder's functions of iOS 18, called as an app calls them, with rubbish as padding."""

    def __init__(self, path: Path, chunk: int = 8) -> None:
        self.program = MilProgram(MilPackage.open(path))
        self.states = self.program.new_states("prefill")
        self.chunk = chunk
        self.length = 0

    def prefill(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        for start in range(0, embeds.shape[1], self.chunk):
            rows = min(self.chunk, embeds.shape[1] - start)
            padded = np.full((1, self.chunk, embeds.shape[2]), np.nan, np.float32)
            padded[:, :rows] = embeds[:, start : start + rows]
            place = np.zeros((1, self.chunk), np.int32)
            place[:, :rows] = positions[:, start : start + rows]
            logits = self._run("prefill", padded, place, length=[rows])
            self.length += rows
        return logits

    def decode(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        logits = self._run("decode", embeds, positions)
        self.length += 1
        return logits

    def embed(self, token_ids: Sequence[int]) -> np.ndarray:
        ids = np.zeros((1, self.chunk), np.int32)
        ids[0, : len(token_ids)] = token_ids
        return self.program.run("embedding", {"input_ids": ids})["embeds"][:, : len(token_ids)]

    def _run(
        self, function: str, embeds: np.ndarray, positions: np.ndarray, **extra: Any
    ) -> np.ndarray:
        inputs = {
            "embeds": embeds,
            "position_ids": np.asarray(positions, np.int32),
            "past_length": np.array([self.length], np.int32),
            **{name: np.array(value, np.int32) for name, value in extra.items()},
        }
        return self.program.run(function, inputs, self.states)["logits"][0, 0]


def run_vision(path: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    return MilProgram(MilPackage.open(path)).run("main", {"pixel_values": pixels})
