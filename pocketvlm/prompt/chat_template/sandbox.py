"""A Jinja environment for untrusted templates: bounded in time and memory, without any access.

A chat template is a program that comes with a model. Jinja's sandbox keeps it away from Python, but
not from `"x" * 10**10`. Here nothing is computed before its size is known: literals, operators,
filters, calls and concatenated text are charged to a budget, every iteration of a loop is counted,
and operations whose results can be larger than their inputs (padding, repetition, formats, powers)
are checked first. No value may be larger than the budget's `largest`, however often parts of it are
shared.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

from pocketvlm.prompt.chat_template.budget import (
    MAX_DEPTH,
    MAX_INTEGER_BITS,
    MAX_WIDTH,
    Budget,
    TemplateLimitError,
    is_number,
    require_small,
)
from pocketvlm.prompt.chat_template.filters import FILTER_CHECKS, FILTERS, Arguments
from pocketvlm.prompt.chat_template.formatting import BoundedFormat, format_percent
from pocketvlm.prompt.chat_template.instrument import (
    CHARGE,
    CONCAT,
    TICK,
    GenerationTag,
    Instrument,
)

__all__ = ["TemplateSandbox"]


_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold center count endswith expandtabs find index isalnum isalpha "
        "isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle "
        "isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind "
        "rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase "
        "title upper zfill".split()
    ),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    float: frozenset({"is_integer"}),
}
"""Methods of plain values that a template may call."""

_SCOPES = ("_loop_vars", "_block_vars")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with a budget.

    Attributes:
        budget: The work that the current rendering may do; reset for each.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    intercepted_unops = frozenset({"+", "-"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,  # a prompt is not HTML
            # Nothing is evaluated while a template is compiled, since nothing is counted then.
            optimized=False,
            finalize=_count_output,
            extensions=[GenerationTag, loopcontrols],
        )
        self.budget = Budget()
        self.filters = {
            name: self._bounded_filter(name, function)
            for name, function in {**self.filters, "tojson": self._to_json}.items()
            if name in FILTERS
        }
        self.filters[CHARGE] = self._charge
        self.filters[TICK] = self._tick
        self.filters[CONCAT] = self._concat_values
        self.tests = {name: self._bounded(function) for name, function in self.tests.items()}
        self.globals = {
            "range": self.globals["range"],
            "dict": _TemplateDict(),
            "namespace": _TemplateNamespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self._functions = {id(function) for function in self.globals.values()}

    def parse_bounded(self, source: str) -> nodes.Template:
        """Parses a template, and inserts the counting."""
        tree = self.parse(source)
        bounded: nodes.Template = Instrument().visit(tree)
        bounded.set_environment(self)
        return bounded

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins what a block, a macro or the template wrote."""
        found, total = [], 0
        for piece in pieces:
            total += len(piece)
            self.budget.admit(total)
            found.append(piece)
        self.budget.spend(total)
        return "".join(found)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes `left operator right`."""
        budget = self.budget
        budget.step()
        if operator == "%" and isinstance(left, str):
            return format_percent(self.budget, left, right)
        if operator == "*" and not (is_number(left) and is_number(right)):
            count, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int):
                size = len(value) if isinstance(value, str) else budget.weigh(value)
                units = max(count, 0) * size
                budget.admit(units)
                budget.spend(units)
        elif operator == "+":
            budget.admit(budget.weigh(left) + budget.weigh(right))
        for operand in (left, right):
            require_small(operand)
        if (
            operator == "**"
            and isinstance(left, int)
            and isinstance(right, int)
            and abs(left) > 1
            and left.bit_length() * right > 2 * MAX_INTEGER_BITS
        ):
            raise TemplateLimitError(f"it makes a number of more than {MAX_INTEGER_BITS} bits")
        return require_small(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with bounded widths."""
        if (
            isinstance(value, types.MethodType | types.BuiltinMethodType)
            and value.__name__ in ("format", "format_map")
            and isinstance(value.__self__, str)
        ):
            return BoundedFormat(
                self, self.budget, str(value.__self__), by_map=value.__name__ == "format_map"
            )
        return None

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, PYI063  (a keyword may be called self)
        """Calls what a template may call."""
        budget = __self.budget
        budget.step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) or type(owner) in _METHODS:
            # What compiled templates pass to macros; Jinja removes it from other calls as well.
            kwargs = {name: value for name, value in kwargs.items() if name not in _SCOPES}
        if isinstance(owner, str):
            __self._require_method(str, __obj)
            return __self._call_text_method(owner, __obj.__name__, args, kwargs)
        if type(owner) in _METHODS:
            __self._require_method(type(owner), __obj)
            budget.weigh(owner)
            result = __obj(*args, **kwargs)
            budget.weigh(result)
            return result
        if (
            isinstance(__obj, Macro | LoopContext | BlockReference | Undefined | BoundedFormat)
            or isinstance(owner, LoopContext | Cycler | Joiner | Extension | _TemplateDict)
            or isinstance(__obj, Joiner)
            or id(__obj) in __self._functions
        ):
            budget.weigh((args, kwargs))
            return super().call(__context, __obj, *args, **kwargs)
        name = getattr(__obj, "__name__", type(__obj).__name__)
        raise SecurityError(f"{name!r} is not available to chat templates")

    def _require_method(self, kind: type, method: Any) -> None:
        if method.__name__ not in _METHODS[kind]:
            raise SecurityError(
                f"the method {method.__name__!r} of {kind.__name__!r} is not available to chat "
                f"templates"
            )

    def _call_text_method(
        self, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        budget = self.budget
        budget.weigh(text)
        if name == "join" and len(args) == 1:
            args = (list(args[0]),)
        budget.weigh(args)
        if name in ("center", "ljust", "rjust", "zfill") and args and isinstance(args[0], int):
            budget.admit(args[0])
        elif name == "expandtabs":
            size = kwargs.get("tabsize", args[0] if args else 8)
            budget.admit(len(text) + text.count("\t") * int(size))
        elif name == "replace" and len(args) > 1:
            self._admit_replacement(text, args[0], args[1])
        elif name == "join" and len(args) == 1:
            budget.admit(budget.weigh(args[0]) + len(text) * len(args[0]))
        result = getattr(text, name)(*args, **kwargs)
        budget.weigh(result)
        return result

    def _admit_replacement(self, text: str, old: Any, new: Any) -> None:
        if isinstance(old, str) and isinstance(new, str):
            self.budget.admit(len(text) + text.count(old) * len(new))

    def _bounded_filter(self, name: str, function: Any) -> Callable[..., Any]:
        if name == "format":
            return self._bounded(self._format_filter)
        check = FILTER_CHECKS.get(name)
        bounded = self._bounded(function)
        if check is None:
            return bounded
        # The environment, or a context, may come before the value.
        start = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(bounded)
        def checked(*args: Any, **kwargs: Any) -> Any:
            passed, value, others = args[:start], args[start], args[start + 1 :]
            if name == "join":
                value = list(value)  # items of a generator are counted as well
            self.budget.weigh((value, others, kwargs))
            check(self.budget, value, Arguments(others, kwargs))
            return bounded(*passed, value, *others, **kwargs)

        return checked

    def _format_filter(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if args and kwargs:
            raise TypeError("can't handle positional and keyword arguments at the same time")
        return format_percent(self.budget, str(value), kwargs or args)

    def _bounded(self, function: Any) -> Callable[..., Any]:
        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            budget = self.budget
            budget.step()
            for value in (*args, *kwargs.values()):
                budget.weigh(value)
            result = function(*args, **kwargs)
            budget.weigh(result)
            return result

        return bounded

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is None and separators is None:
            return json.dumps(value, ensure_ascii=ensure_ascii, sort_keys=sort_keys)
        if isinstance(indent, int):
            self.budget.admit(indent * MAX_DEPTH)
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return self.concat(encoder.iterencode(value))

    def _charge(self, value: Any) -> Any:
        self.budget.weigh(value)
        return value

    def _tick(self, value: Any) -> Any:
        self.budget.step()
        return value

    def _concat_values(self, *values: Any) -> str:
        self.budget.admit(sum(self.budget.weigh(value) for value in values))
        return self.concat(map(str, values))


@pass_context
def _count_output(context: Context, value: Any) -> Any:
    sandbox = context.environment
    if isinstance(sandbox, TemplateSandbox):  # there is no public alternative
        sandbox.budget.weigh(value)
    return value


class _TemplateDict:
    """What templates know as `dict`."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """What templates know as `namespace`; private names are refused, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _require_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the private name {name!r}")


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message)[:1000])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > MAX_WIDTH:
        raise TemplateLimitError(f"a date's format has more than {MAX_WIDTH} characters")
    return datetime.now().strftime(pattern)  # noqa: DTZ005  (a prompt states local time)
