"""Writes Core ML packages operator by operator, every weight once, the same bytes each time.

Building the program directly instead of converting a traced one keeps every operator, name and
byte under control: coremltools checks each operator's types as it is added and serializes the
program, and nothing else of it runs. Functions of one package refer to the same stored weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import TensorSignature
from pocketvlm.errors import ExportError
from pocketvlm.export.coreml.constexpr import Codes, Constexpr, FloatArray
from pocketvlm.export.coreml.limits import Deployment
from pocketvlm.export.coreml.package import create_package, read_back, write_model

__all__ = ["FunctionWriter", "PackageWriter", "identifier"]


class PackageWriter:
    """One package under construction.

    A name stands for one constant in all of its functions, which is stored once.

    Args:
        deployment: The oldest system that has to read it.
        float_type: What its graphs compute in.

    Attributes:
        packed: Weights by name.
        arrays: Constants by name, with their digests.
    """

    def __init__(self, deployment: Deployment, float_type: type[np.floating]) -> None:
        import coremltools
        from coremltools.converters.mil.mil import Builder, Program

        self.deployment: Deployment = deployment
        self.float_type = float_type
        self.packed: dict[str, Constexpr | FloatArray] = {}
        self.arrays: dict[str, tuple[npt.NDArray[Any], str]] = {}
        self._target = coremltools.target[deployment]
        self._program = Program()
        # Names are numbered by a counter of the process, which a conversion before may have left.
        Builder.name_count.clear()

    @contextmanager
    def function(
        self,
        name: str,
        inputs: Sequence[TensorSignature],
        states: Sequence[TensorSignature] = (),
    ) -> Iterator[FunctionWriter]:
        """A function of static shapes; it has the outputs that the block gives its writer."""
        from coremltools.converters.mil.mil import Builder, Function

        placeholders = {
            signature.name: Builder.TensorSpec(signature.shape, dtype=_mil_type(signature.dtype))
            for signature in inputs
        } | {
            signature.name: Builder.StateTensorSpec(
                signature.shape, dtype=_mil_type(signature.dtype)
            )
            for signature in states
        }
        with Function(placeholders, opset_version=self._target) as function:
            writer = FunctionWriter(self, dict(function.inputs))
            yield writer
            function.set_outputs(list(writer.outputs))
        self._program.add_function(name, function)

    def save(self, path: Path, *, default: str | None = None) -> None:
        """Writes the package and reads it back.

        Args:
            path: The `.mlpackage` folder.
            default: The function that a runtime takes if none is named; `None` where the package
                has one function, `main`.

        Raises:
            ExportError: The toolkit could not write the program, or not read it again.
        """
        from coremltools.converters.mil.backend.mil.load import load

        if default is not None:
            self._program.default_function_name = default
            self._program.export_as_multifunction = True
        weights = create_package(path)
        try:
            # No pass of the toolkit runs: the program is what was written.
            spec = load(self._program, str(weights), specification_version=self._target.value)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ExportError(f"{path.name}: coremltools cannot write it: {reason}") from error
        write_model(path, spec)
        read_back(path)


class FunctionWriter:
    """One function under construction.

    Attributes:
        package: What it belongs to.
        inputs: Its inputs and states by name.
        outputs: Its outputs so far.
    """

    def __init__(self, package: PackageWriter, inputs: Mapping[str, Any]) -> None:
        self.package = package
        self.inputs = inputs
        self.outputs: list[Any] = []
        self._constants: dict[str, Any] = {}

    def constant(self, name: str, values: npt.NDArray[Any] | Codes) -> Any:
        """A stored constant; asking again for the same name returns it."""
        label = identifier(name)
        if label not in self._constants:
            from coremltools.converters.mil.mil import Builder

            if label not in self.package.arrays:
                self.package.arrays[label] = _typed(values)
            array, digest = self.package.arrays[label]
            constant = Builder.const(val=array, name=label)
            constant.op.weight_id = digest
            self._constants[label] = constant
        return self._constants[label]

    def weight(self, name: str, pack: Callable[[], Constexpr | FloatArray]) -> Any:
        """A weight matrix, expanded from what is stored; `pack` is called once a package."""
        if name not in self.package.packed:
            self.package.packed[name] = pack()
        packed = self.package.packed[name]
        if not isinstance(packed, Constexpr):
            return self.constant(f"{name}.weight", packed)
        label = identifier(f"{name}.weight")
        if label not in self._constants:
            self._constants[label] = self._expand(label, packed)
        return self._constants[label]

    def output(self, value: Any, name: str, dtype: str) -> None:
        """Makes a value an output of the function."""
        from coremltools.converters.mil.mil import Builder

        self.outputs.append(Builder.cast(x=value, dtype=_SHORT[dtype], name=name))

    def _expand(self, label: str, packed: Constexpr) -> Any:
        from coremltools.converters.mil.mil import Builder

        operands: dict[str, Any] = {}
        for parameter, operand in packed.operands.items():
            if isinstance(operand, Constexpr):
                operands[parameter] = self._expand(f"{label}_{parameter}", operand)
            elif isinstance(operand, int):
                operands[parameter] = np.int32(operand)
            else:
                operands[parameter] = self.constant(f"{label}_{parameter}", operand)
        if packed.source is not None:
            mask, values = self._expand(f"{label}_sparse", packed.source)
            operands |= {_MASK_OF[packed.operator]: mask, "nonzero_data": values}
        return getattr(Builder, packed.operator)(**operands, name=label)


def identifier(name: str) -> str:
    """A name as the format allows it: letters, digits and underscores."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


_MASK_OF = {
    "constexpr_sparse_blockwise_shift_scale": "data_mask",
    "constexpr_sparse_to_dense": "mask",
}
_SHORT = {"float16": "fp16", "float32": "fp32", "int32": "int32"}


def _mil_type(dtype: str) -> Any:
    from coremltools.converters.mil.mil import types

    return getattr(types, _SHORT[dtype])


def _typed(values: npt.NDArray[Any] | Codes) -> tuple[npt.NDArray[Any], str]:
    """An array in the toolkit's own type of its width, without a copy, and its digest."""
    from coremltools.converters.mil.mil import types

    array = np.ascontiguousarray(values.values if isinstance(values, Codes) else values)
    kind = array.dtype.name
    digest = hashlib.sha256(array.data)
    if isinstance(values, Codes) and values.bits < 8:  # noqa: PLR2004  (a byte)
        kind = f"{'int' if values.is_signed else 'uint'}{values.bits}"
        array = array.view(getattr(types, f"np_{kind}_dtype"))
    digest.update(f"{kind}{array.shape}".encode())
    return array, digest.hexdigest()
