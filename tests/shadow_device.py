"""A device that is not there: tensors say that they are on it, and are computed by the processor.

What a real device refuses is refused here: an operation over tensors of two places (numbers without
dimensions and indices in main memory aside), numpy, and float64 where a device has none. Values are
those of the processor to the last bit, so that results can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["shadow_device"]

_MOVES = frozenset({Tensor.copy_, torch._has_compatible_shallow_copy_type})
_INDEXED = frozenset({Tensor.__getitem__, Tensor.__setitem__})
_TO_NUMPY = frozenset({Tensor.numpy, Tensor.__array__})


class _Shadow(Tensor):
    """A tensor on the device."""


@contextmanager
def shadow_device(name: str) -> Iterator[list[str]]:
    """Inside, there is a device of this name.

    Yields:
        The names of the functions that it has computed.
    """
    mode = _ShadowMode(torch.device(name))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mode:
            yield mode.computed
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


class _ShadowMode(TorchFunctionMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.computed: list[str] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        _types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(options or {})
        with torch._C.DisableTorchFunctionSubclass():
            if function == Tensor.device.__get__:
                is_here = isinstance(arguments[0], _Shadow)
                return self._device if is_here else torch.device("cpu")
            if function is Tensor.cpu:
                return _plain(arguments[0])
            if function is Tensor.to:
                return self._move(*arguments, **options)
            if function in _TO_NUMPY and isinstance(arguments[0], _Shadow):
                raise TypeError(f"{self._device} has no numpy arrays")
            asked = options.pop("device", None)
            here = [value for value in _tensors((arguments, options)) if isinstance(value, _Shadow)]
            self._refuse_two_places(function, arguments, options, here)
            found = function(*arguments, **options)
            if asked is None and here:
                self.computed.append(getattr(function, "__name__", str(function)))
            is_made_here = here if asked is None else self._is_here(asked)
            return self._wrapped(found) if is_made_here else found

    def _is_here(self, device: Any) -> bool:
        return torch.device(device).type == self._device.type

    def _move(self, values: Tensor, *arguments: Any, **options: Any) -> Tensor:
        device = options.pop("device", None)
        if arguments and isinstance(arguments[0], torch.device | str):
            device, *rest = arguments
            arguments = tuple(rest)
        if arguments and isinstance(arguments[0], Tensor):
            raise NotImplementedError("moves name a device")
        options.pop("non_blocking", None)
        rest = [each for each in arguments if each is not None and not isinstance(each, bool)]
        moved = values.to(*rest, **options) if rest or options else values
        stays = isinstance(values, _Shadow) if device is None else self._is_here(device)
        return self._wrapped(moved) if stays else _plain(moved)

    def _wrapped(self, found: Any) -> Any:
        if isinstance(found, Tensor):
            if self._device.type == "mps" and found.dtype == torch.float64:
                raise TypeError("Metal has no float64")
            return found if isinstance(found, _Shadow) else found.as_subclass(_Shadow)
        if type(found).__module__ == "torch.return_types":
            return type(found)([self._wrapped(each) for each in found])
        if isinstance(found, tuple | list):
            return type(found)(self._wrapped(each) for each in found)
        return found

    def _refuse_two_places(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
        here: Sequence[Tensor],
    ) -> None:
        if function in _MOVES or not here:
            return
        elsewhere = [
            value
            for value in _tensors((arguments, options))
            if not isinstance(value, _Shadow) and value.dim() > 0
        ]
        if function in _INDEXED and isinstance(arguments[0], _Shadow):
            given = list(_tensors(arguments[2:]))
            elsewhere = [value for value in elsewhere if any(value is each for each in given)]
        if elsewhere:
            raise RuntimeError(f"{function}: tensors on {self._device} and in main memory")


def _plain(values: Tensor) -> Tensor:
    return values.as_subclass(Tensor) if isinstance(values, _Shadow) else values


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for each in values.values():
            yield from _tensors(each)
    elif isinstance(values, tuple | list):
        for each in values:
            yield from _tensors(each)
