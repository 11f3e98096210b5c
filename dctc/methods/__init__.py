"""Methods by name: one file a method, found by its module name.

A method module offers a frozen dataclass ``Options`` (every field with a default) and
``build(spec, options) -> Method``; whoever adds a method adds such a file and a YAML, nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dctc.methods.base import Batch, Method, Update, inference
from dctc.networks import NetworkSpec

__all__ = ["Batch", "Method", "OptionError", "Update", "build_method", "inference", "method_names", "parse_options"]


class OptionError(ValueError):
    """A method's name or option is wrong.

    Attributes:
        key: the offender, below ``method``.
        wrong: the name that is not known, and ``known`` those that are; empty when it is not about a name.
    """

    def __init__(self, key: str, message: str, wrong: str = "", known: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.key = key
        self.wrong = wrong
        self.known = list(known)


def method_names() -> list[str]:
    """Names of the modules of this package that offer a method."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in names if hasattr(_module(name), "build")]


def build_method(name: str, spec: NetworkSpec, options: Mapping[str, Any]) -> Method:
    """A method with freshly initialised parts (from torch's global generator: seed it first).

    Raises:
        OptionError: unknown method, unknown option or a value of the wrong type.
    """
    chosen = parse_options(name, options)
    method: Method = _module(name).build(spec, chosen)
    return method


def parse_options(name: str, raw: Mapping[str, Any]) -> Any:
    """The ``Options`` of method ``name`` from plain values; raises :class:`OptionError`.

    ``Options`` refuse a value out of range by a :class:`ValueError` whose message begins with the option's name.
    """
    names = method_names()
    if name not in names:
        raise OptionError("name", f"unknown method {name!r}", name, names)
    kind = _module(name).Options
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise OptionError(key, f"method {name} has no option {key!r}", key, known)
        values[key] = _checked(key, value, hints[key])
    try:
        return kind(**values)
    except ValueError as error:  # its message begins with the option's name
        raise OptionError(str(error).split()[0], str(error)) from None


def _checked(key: str, value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` wants it: a plain type, a Literal, a union of such, or a tuple (a list in YAML)."""
    if get_origin(hint) is Literal:
        fits = value in get_args(hint) and type(value) in {type(choice) for choice in get_args(hint)}
        wanted = "one of " + ", ".join(map(str, get_args(hint)))
    elif get_origin(hint) in (Union, UnionType):
        fits = any(_fits(value, choice) for choice in get_args(hint))
        wanted = str(hint)
    else:
        fits = _fits(value, hint)
        wanted = getattr(hint, "__name__", str(hint))
    if not fits:
        raise OptionError(key, f"{key} is {value!r}: expected {wanted}")
    if hint is float:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    kind = get_origin(hint) or hint
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, {float: (float, int), tuple: (list, tuple)}.get(kind, kind))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
