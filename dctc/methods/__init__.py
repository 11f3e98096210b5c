"""Methods by name: one file a method, found by its module name.

A method module offers a frozen dataclass ``Options`` (every field with a default) and
``build(spec, options) -> Method``; whoever adds a method adds such a file and a YAML, nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dctc.methods.base import Batch, Method, Update, inference
from dctc.networks import NetworkSpec

__all__ = ["Batch", "Method", "OptionError", "Update", "build_method", "inference", "method_names", "parse_options"]


class OptionError(ValueError):
    """A method's name or option is wrong; ``key`` is the offender below ``method``, ``known`` the valid names."""

    def __init__(self, key: str, message: str, known: list[str]) -> None:
        super().__init__(message)
        self.key = key
        self.known = known


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
        raise OptionError("name", f"unknown method {name!r}", names)
    kind = _module(name).Options
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise OptionError(key, f"method {name} has no option {key!r}", known)
        values[key] = _checked(key, value, hints[key])
    try:
        return kind(**values)
    except ValueError as error:  # its message begins with the option's name
        raise OptionError(str(error).split()[0], str(error), []) from None


def _checked(key: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        if value not in get_args(hint):
            raise OptionError(key, f"{key} is {value!r}: choose one of {', '.join(choices)}", choices)
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise OptionError(key, f"{key} is {value!r}: expected {hint.__name__}", [])
    return value


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
