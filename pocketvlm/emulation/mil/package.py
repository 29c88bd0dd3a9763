"""Reads an ML program package: its functions, operators and types, as plain data.

A package is a folder whose `Manifest.json` names a model specification and a folder of weights.
The specification is a protocol-buffer message of the public Core ML format; field numbers below
are those of its `Model.proto` and `MIL.proto`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketvlm.emulation.mil.blobs import WeightFile
from pocketvlm.emulation.mil.systems import LOWEST_SYSTEMS
from pocketvlm.emulation.mil.types import ELEMENTS, Array, Element, TensorType
from pocketvlm.errors import BundleError
from pocketvlm.files.protobuf import Message
from pocketvlm.files.reader import locate, read_bytes
from pocketvlm.json_io import decode, read_json

__all__ = ["Argument", "Function", "Literal", "MilPackage", "Operation", "Parameter"]

_ELEMENT_BY_CODE = {element.code: element for element in ELEMENTS.values()}
_ML_PROGRAM = 502
_WEIGHTS_PREFIX = "@model_path/"
_MAX_MODEL_BYTES = 2**31
_CONTENTS = ("itemInfoEntries", "rootModelIdentifier")


@dataclass(frozen=True, kw_only=True, eq=False)
class Literal:
    """A constant in a program.

    Attributes:
        type: Its type.
        key: The same for literals of the same value; every function of a package shares its
            weights by it.
        immediate: The value, if the specification holds it.
        blob: Weight file and offset, if a weight file holds it.
    """

    type: TensorType
    key: tuple[object, ...]
    immediate: Array | None = None
    blob: tuple[WeightFile, int] | None = None

    def load(self) -> Array:
        """Reads the value."""
        if self.immediate is not None:
            return self.immediate
        if self.blob is None:
            raise ValueError("a literal has neither a value nor a place")
        weights, offset = self.blob
        flat = weights.read(offset, self.type.element, self.type.count)
        return flat.reshape(self.type.sizes).astype(self.type.element.held, copy=False)


Argument = str | Literal
"""The name of a value, or a value."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """An input of a function, or an output of an operator.

    Attributes:
        name: Its name, unique in the function.
        type: Its type.
        is_state: Whether it lives from call to call.
    """

    name: str
    type: TensorType
    is_state: bool = False


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operator.

    Attributes:
        kind: The operator's name.
        inputs: Arguments of each parameter; all but lists have one.
        outputs: What it defines.
        value: The value of a `const`.
        has_blocks: Whether it has inner blocks, as control flow does.
    """

    kind: str
    inputs: Mapping[str, tuple[Argument, ...]]
    outputs: tuple[Parameter, ...]
    value: Literal | None
    has_blocks: bool


@dataclass(frozen=True, kw_only=True)
class Function:
    """One entry point.

    Attributes:
        name: Its name; `main` where a package has a single one.
        inputs: Inputs, then states.
        operations: In an order in which they can be run.
        outputs: Names of the values that it returns.
    """

    name: str
    inputs: tuple[Parameter, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MilPackage:
    """A package.

    Attributes:
        path: The folder.
        functions: Its entry points by name.
        specification_version: Of the format: 7 is iOS 16, 8 iOS 17, 9 iOS 18.
    """

    path: Path
    functions: Mapping[str, Function]
    specification_version: int

    @classmethod
    def open(cls, path: Path) -> MilPackage:
        """Reads a package; weights are read when they are asked for.

        Raises:
            BundleError: It is damaged, or does not hold an ML program.
        """
        model_file, data = _find_model(path)
        try:
            model = Message(data)
            if not model.has(_ML_PROGRAM):
                raise BundleError(f"{path}: holds no ML program")
            reader = _Reader(model_file.parent)
            functions = {
                name: reader.function(name, message)
                for name, message in model.message(_ML_PROGRAM).mapping(2).items()
            }
            version = model.integer(1)
            if version not in LOWEST_SYSTEMS:
                known = ", ".join(map(str, LOWEST_SYSTEMS))
                raise BundleError(f"{model_file}: specification {version}; allowed are {known}")
        except (ValueError, KeyError) as error:
            raise BundleError(f"{model_file}: cannot be read: {error}") from error
        return cls(path=path, functions=functions, specification_version=version)

    def function(self, name: str) -> Function:
        """An entry point by name; the only one answers to any name.

        Raises:
            BundleError: There are several, and none of that name.
        """
        if name in self.functions:
            return self.functions[name]
        if len(self.functions) == 1:
            return next(iter(self.functions.values()))
        raise BundleError(
            f"{self.path}: no function {name!r}; there are {', '.join(sorted(self.functions))}"
        )


def _find_model(path: Path) -> tuple[Path, bytes]:
    manifest = locate(path, "Manifest.json")
    document = read_json(manifest)
    try:
        contents = decode(_Contents, {key: document[key] for key in _CONTENTS})
        # Core ML's compiler follows every entry, not only that of the model.
        for item in contents.itemInfoEntries.values():
            _require_inside(path / "Data", str(item["path"]))
        name = str(contents.itemInfoEntries[contents.rootModelIdentifier]["path"])
    except (ValueError, KeyError) as error:
        raise BundleError(f"{manifest}: not the manifest of a package: {error!r}") from error
    model = locate(path / "Data", name)
    return model, read_bytes(model, max_bytes=_MAX_MODEL_BYTES)


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """What a package's manifest says, under the names that Apple gave it."""

    itemInfoEntries: Mapping[str, Mapping[str, Any]]  # noqa: N815  (its name in the file)
    rootModelIdentifier: str  # noqa: N815  (likewise)


def _require_inside(folder: Path, name: str) -> None:
    """An entry may be a file or a folder; either must be inside."""
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of the package")


class _Reader:
    """Turns messages into plain data; weight files are relative to the specification."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, WeightFile] = {}

    def function(self, name: str, message: Message) -> Function:
        blocks = message.mapping(3)
        opset = message.text(2)
        if opset not in blocks:
            raise ValueError(f"function {name} has no block for its opset {opset!r}")
        block = blocks[opset]
        return Function(
            name=name,
            inputs=tuple(self._parameter(entry) for entry in message.messages(1)),
            operations=tuple(self._operation(entry) for entry in block.messages(3)),
            outputs=tuple(block.texts(2)),
        )

    def _operation(self, message: Message) -> Operation:
        kind = message.text(1)
        attributes = message.mapping(5)
        value = attributes.pop("val", None) if kind == "const" else None
        inputs = {
            name: tuple(self._argument(binding) for binding in argument.messages(1))
            for name, argument in message.mapping(2).items()
        }
        if kind.startswith("constexpr_"):  # iOS 16 keeps their arguments among the attributes
            del attributes["name"]
            inputs |= {name: (self._literal(entry),) for name, entry in attributes.items()}
        return Operation(
            kind=kind,
            inputs=inputs,
            outputs=tuple(self._parameter(entry) for entry in message.messages(3)),
            value=None if value is None else self._literal(value),
            has_blocks=message.has(4),
        )

    def _argument(self, binding: Message) -> Argument:
        return binding.text(1) if binding.has(1) else self._literal(binding.message(2))

    def _parameter(self, message: Message) -> Parameter:
        kind = message.message(2)
        if kind.has(5):
            wrapped = kind.message(5).message(1)
            return Parameter(name=message.text(1), type=_tensor_type(wrapped), is_state=True)
        return Parameter(name=message.text(1), type=_tensor_type(kind))

    def _literal(self, message: Message) -> Literal:
        kind = _tensor_type(message.message(2))
        if message.has(5):
            blob = message.message(5)
            name, offset = blob.text(1), blob.integer(2)
            return Literal(
                type=kind, key=(name, offset, str(kind)), blob=(self._file(name), offset)
            )
        values = _immediate(message.message(3).message(1), kind)
        held = tuple(values.flat) if values.dtype == object else values.tobytes()
        return Literal(type=kind, key=(held, str(kind)), immediate=values)

    def _file(self, name: str) -> WeightFile:
        if name not in self._files:
            if not name.startswith(_WEIGHTS_PREFIX):
                raise ValueError(f"weights at {name!r}, which is not inside of the package")
            self._files[name] = WeightFile(locate(self._folder, name.removeprefix(_WEIGHTS_PREFIX)))
        return self._files[name]


def _tensor_type(message: Message) -> TensorType:
    """A tensor's type; a scalar is a tensor without dimensions."""
    if not message.has(1):
        raise ValueError("a value is not a tensor")
    tensor = message.message(1)
    code = tensor.integer(1)
    if code not in _ELEMENT_BY_CODE:
        raise ValueError(f"element type {code} is not known")
    shape = tuple(
        entry.message(1).integer(1) if entry.has(1) else None for entry in tensor.messages(3)
    )
    return TensorType(_ELEMENT_BY_CODE[code], shape)


def _immediate(tensor: Message, kind: TensorType) -> Array:
    """A value that the specification holds itself, by the kind of its list."""
    element = kind.element
    if tensor.has(4):
        flat: Array = np.array(tensor.message(4).texts(1), object)
    elif tensor.has(7):
        flat = _immediate_bytes(tensor.message(7).data(1), element, kind.count)
    elif tensor.has(1):
        flat = tensor.message(1).floats(1, "<f4")
    elif tensor.has(6):
        flat = tensor.message(6).floats(1, "<f8")
    else:
        lists = [tensor.message(number) for number in (2, 3, 5)]
        flat = np.array([value for found in lists for value in found.integers(1)], np.int64)
    if flat.size != kind.count:
        raise ValueError(f"{flat.size} values for a {kind}")
    return flat.reshape(kind.sizes).astype(element.held, copy=False)


def _immediate_bytes(data: bytes, element: Element, count: int) -> Array:
    """Packed types are written packed or with one element per byte, depending on the writer."""
    if element.is_packed and len(data) == count:
        return np.frombuffer(data, element.stored)
    return element.decode(data, count)
