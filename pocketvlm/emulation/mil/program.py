"""A reference evaluator of MIL programs: what a package on disk computes, in numpy.

It is not Core ML. It reads the package that Core ML would load, decodes every compressed weight
exactly, and computes each operator as its specification says, in float32, rounded to float16 after
every operator whose result the program declares to be float16. A device may fuse operators and
accumulate differently, so its results differ by such roundings, and by nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pocketvlm.emulation.mil.constexpr import CONSTEXPR
from pocketvlm.emulation.mil.layout import slice_update_in_place
from pocketvlm.emulation.mil.liveness import find_in_place_updates
from pocketvlm.emulation.mil.ops import LIST_PARAMETERS, MOVERS, OPERATORS, Operator
from pocketvlm.emulation.mil.package import Argument, Function, Literal, MilPackage, Operation
from pocketvlm.emulation.mil.types import Array, TensorType
from pocketvlm.errors import BundleError

__all__ = ["MilProgram", "States"]

States = dict[str, Array]
"""What lives from call to call, by name; changed in place of the entry, never of the array."""


class MilProgram:
    """A package that is ready to run.

    Attributes:
        package: The package.
    """

    def __init__(self, package: MilPackage) -> None:
        """Decodes every weight once, whichever functions share it.

        Raises:
            BundleError: A function has an unknown operator, or an operator an unknown parameter.
        """
        self.package = package
        weights: _Weights = {}
        self._functions = {
            name: _Compiled(function, package, weights)
            for name, function in package.functions.items()
        }

    def new_states(self, function: str) -> States:
        """States of a function, as a runtime makes them: all zero.

        Raises:
            BundleError: One has no fixed shape.
        """
        described = self.package.function(function)
        states = {}
        for parameter in described.inputs:
            if parameter.is_state:
                try:
                    sizes = parameter.type.sizes
                except BundleError as error:
                    where = f"{self.package.path}, function {function}: {parameter.name}"
                    raise BundleError(f"{where}: {error}") from error
                states[parameter.name] = np.zeros(sizes, parameter.type.element.held)
        return states

    def run(
        self, function: str, inputs: Mapping[str, Array], states: States | None = None
    ) -> dict[str, Array]:
        """Computes a function.

        Args:
            function: Its name.
            inputs: Every input by name; values are rounded to the declared types.
            states: What `new_states` made; its entries are replaced as the program writes them.

        Returns:
            Every output by name; float16 values come as float32.

        Raises:
            ValueError: An input or state is missing, unknown or of another shape.
            BundleError: An operator cannot be computed.
        """
        described = self.package.function(function)
        return self._functions[described.name].run(inputs, {} if states is None else states)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One operator with its constants at hand.

    Attributes:
        operation: What it is.
        compute: Its function; `None` for access to states.
        constants: Arguments that are known.
        names: Arguments that other steps define, by parameter.
        retired: Values that no later step reads.
    """

    operation: Operation
    compute: Operator | None
    constants: Mapping[str, Array | tuple[Array, ...]]
    names: Mapping[str, tuple[Argument, ...]]
    retired: tuple[str, ...]


_Key = tuple[object, ...]
_Weights = dict[_Key, tuple[Array, ...]]
"""Decoded weights by where they are stored and how they are decoded."""


class _Compiled:
    """One function: its constants decoded, its steps bound to what computes them."""

    def __init__(self, function: Function, package: MilPackage, weights: _Weights) -> None:
        self._function = function
        self._where = f"{package.path}, function {function.name}"
        self._weights = weights
        self._constants: dict[str, Array] = {}
        self._keys: dict[str, _Key] = {}
        live = [op for op in function.operations if not self._take_constant(op)]
        last_use = {
            name: number
            for number, operation in enumerate(live)
            for name in _names(operation)
            if name not in self._constants and name not in function.outputs
        }
        in_place = find_in_place_updates(live, last_use, function.outputs)
        self._steps = [
            self._bind(
                operation,
                tuple(name for name, at in last_use.items() if at == number),
                in_place=number in in_place,
            )
            for number, operation in enumerate(live)
        ]

    def run(self, inputs: Mapping[str, Array], states: States) -> dict[str, Array]:
        values: dict[str, Array] = {}
        expected = [parameter.name for parameter in self._function.inputs]
        odd = sorted(set(expected) ^ (set(inputs) | set(states)))
        if odd:
            raise ValueError(f"{self._where}: inputs and states differ in {', '.join(odd)}")
        for parameter in self._function.inputs:
            given = states if parameter.is_state else inputs
            value = np.asarray(given[parameter.name])
            if not parameter.type.admits(value.shape):
                raise ValueError(
                    f"{self._where}: {parameter.name} has shape {list(value.shape)}; it is "
                    f"{parameter.type}"
                )
            if not parameter.is_state:
                values[parameter.name] = parameter.type.element.fit(value)
        for step in self._steps:
            self._take(step, values, states)
        return {name: self._value(name, values) for name in self._function.outputs}

    def _take(self, step: _Step, values: dict[str, Array], states: States) -> None:
        operation = step.operation
        if step.compute is None:
            state = str(operation.inputs["input"][0])
            if operation.kind == "write_state":
                (data,) = operation.inputs["data"]
                states[state] = self._argument(data, values)
            else:
                values[operation.outputs[0].name] = states[state]
        else:
            arguments = {name: _one(name, self._all(a, values)) for name, a in step.names.items()}
            try:
                with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                    found = step.compute(**step.constants, **arguments)
            except (ValueError, IndexError, TypeError) as error:
                raise BundleError(f"{self._say(operation)}: {error}") from error
            self._keep(operation, found, values)
        for name in step.retired:
            values.pop(name, None)

    def _keep(
        self, operation: Operation, found: Array | tuple[Array, ...], values: dict[str, Array]
    ) -> None:
        """Rounds results to their types and holds their shapes against what is declared."""
        results = found if isinstance(found, tuple) else (found,)
        if len(results) != len(operation.outputs):
            raise BundleError(
                f"{self._say(operation)}: {len(results)} results; {len(operation.outputs)} are "
                "declared"
            )
        for output, result in zip(operation.outputs, results, strict=True):
            values[output.name] = self._fitted(operation, result, output.type)

    def _fitted(self, operation: Operation, result: Array, declared: TensorType) -> Array:
        value = np.asarray(result)
        if operation.kind not in MOVERS or value.dtype != declared.element.held:
            value = declared.element.fit(value)
        if not declared.admits(value.shape):
            raise BundleError(
                f"{self._say(operation)}: the result has shape {list(value.shape)}; declared is "
                f"{declared}"
            )
        return value

    def _bind(self, operation: Operation, retired: tuple[str, ...], *, in_place: bool) -> _Step:
        kind = operation.kind
        if kind in ("read_state", "write_state"):
            return _Step(operation=operation, compute=None, constants={}, names={}, retired=retired)
        if kind not in OPERATORS or operation.has_blocks:
            raise BundleError(
                f"{self._say(operation)}: the reference evaluator does not know this operator"
            )
        compute = slice_update_in_place if in_place else OPERATORS[kind]
        _require_parameters(self._say(operation), compute, operation)
        known = {
            name: _one(name, tuple(self._argument(a, self._constants) for a in arguments))
            for name, arguments in operation.inputs.items()
            if all(isinstance(a, Literal) or a in self._constants for a in arguments)
        }
        names = {name: a for name, a in operation.inputs.items() if name not in known}
        return _Step(
            operation=operation, compute=compute, constants=known, names=names, retired=retired
        )

    def _take_constant(self, operation: Operation) -> bool:
        """Decodes an operator that has no variable argument by definition."""
        if operation.kind == "const":
            if operation.value is None:
                raise BundleError(f"{self._say(operation)}: a constant without a value")
            key: _Key = ("const", *operation.value.key)
            if key not in self._weights:
                self._weights[key] = (operation.value.load(),)
        elif operation.kind.startswith("constexpr_"):
            if operation.kind not in CONSTEXPR:
                raise BundleError(
                    f"{self._say(operation)}: the reference evaluator does not know this operator"
                )
            key = (operation.kind, *(self._key(n, a) for n, a in sorted(operation.inputs.items())))
            if key not in self._weights:
                self._weights[key] = self._decode(operation)
        else:
            return False
        for number, output in enumerate(operation.outputs):
            self._constants[output.name] = self._weights[key][number]
            self._keys[output.name] = (*key, number)
        return True

    def _key(self, parameter: str, arguments: tuple[Argument, ...]) -> _Key:
        return (
            parameter,
            *(a.key if isinstance(a, Literal) else self._keys.get(a, (a,)) for a in arguments),
        )

    def _decode(self, operation: Operation) -> tuple[Array, ...]:
        _require_parameters(self._say(operation), CONSTEXPR[operation.kind], operation)
        try:
            arguments = {
                name: self._argument(a[0], self._constants) for name, a in operation.inputs.items()
            }
            found = CONSTEXPR[operation.kind](**arguments)
        except (ValueError, IndexError, KeyError) as error:
            raise BundleError(f"{self._say(operation)}: {error}") from error
        results: dict[str, Array] = {}
        self._keep(operation, found, results)
        return tuple(results[output.name] for output in operation.outputs)

    def _all(
        self, arguments: tuple[Argument, ...], values: Mapping[str, Array]
    ) -> tuple[Array, ...]:
        return tuple(self._argument(argument, values) for argument in arguments)

    def _argument(self, argument: Argument, values: Mapping[str, Array]) -> Array:
        return argument.load() if isinstance(argument, Literal) else self._value(argument, values)

    def _value(self, name: str, values: Mapping[str, Array]) -> Array:
        if name in values:
            return values[name]
        if name in self._constants:
            return self._constants[name]
        raise BundleError(f"{self._where}: the value {name!r} is used before it is defined")

    def _say(self, operation: Operation) -> str:
        name = operation.outputs[0].name if operation.outputs else "no result"
        return f"{self._where}: operator {operation.kind} ({name})"


def _names(operation: Operation) -> set[str]:
    return {a for arguments in operation.inputs.values() for a in arguments if isinstance(a, str)}


def _one(parameter: str, values: tuple[Array, ...]) -> Array | tuple[Array, ...]:
    return values if parameter in LIST_PARAMETERS else values[0]


def _require_parameters(say: str, compute: Operator, operation: Operation) -> None:
    known = inspect.signature(compute).parameters
    unknown = sorted(operation.inputs.keys() - known.keys())
    if unknown:
        raise BundleError(f"{say}: the reference evaluator does not know {', '.join(unknown)}")
    missing = sorted(
        name
        for name, parameter in known.items()
        if parameter.default is inspect.Parameter.empty and name not in operation.inputs
    )
    if missing:
        raise BundleError(f"{say}: {', '.join(missing)} is not given")
