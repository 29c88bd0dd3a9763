"""What a Core ML runner needs of whatever computes a package, and the evaluator that does.

There are two ways to compute a package: the reference evaluator of this project, anywhere, and
Core ML itself, on an Apple machine (`apple`). The runner above them is the same code, so that what
is tested here about chunks, padding and the cache holds there too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

from pocketvlm.emulation.mil.package import MilPackage
from pocketvlm.emulation.mil.program import MilProgram
from pocketvlm.emulation.mil.types import Array
from pocketvlm.errors import BundleError

__all__ = ["ComputedPackage", "OpenPackage", "ReferencePackage"]


class ComputedPackage(ABC):
    """A package that can be run, with one set of states.

    Attributes:
        described: The package's description.
        engine: What computes it, in words.
    """

    engine: str

    def __init__(self, path: Path) -> None:
        self.described = MilPackage.open(path)

    @abstractmethod
    def predict(self, function: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Computes a function, on the states that all functions of the package share."""

    @abstractmethod
    def clear_states(self) -> None:
        """Makes all states zero."""


OpenPackage = Callable[[Path], ComputedPackage]
"""Opens a package for one kind of computation."""


class ReferencePackage(ComputedPackage):
    """A package computed by the reference evaluator: numpy, on any machine, and not Core ML."""

    engine = "reference evaluator of MIL programs (numpy); not Core ML"

    def __init__(self, path: Path) -> None:
        """Reads the package and decodes its weights.

        Raises:
            BundleError: It is damaged, or has an operator that the evaluator does not know.
        """
        super().__init__(path)
        self._program = MilProgram(self.described)
        self._states: dict[str, Array] = {}
        self.clear_states()

    def predict(self, function: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Computes a function with the reference evaluator.

        Raises:
            BundleError: The package is damaged, or does not match its bundle's manifest.
        """
        names = {p.name for p in self.described.function(function).inputs if p.is_state}
        own = {name: self._states[name] for name in names}
        try:
            outputs = self._program.run(function, inputs, own)
        except ValueError as error:  # of another shape or name than the manifest says
            raise BundleError(str(error)) from error
        self._states.update(own)
        return outputs

    def clear_states(self) -> None:
        """Makes all states zero."""
        for function in self.described.functions:
            self._states.update(self._program.new_states(function))
