"""YAML into pydantic models, with errors that name the key and the nearest valid name."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from shards.errors import InputError


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: when there is no such file, it is not YAML or holds no mapping.
    """
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}: holds no mapping of keys to values")
    return record


def apply_override(record: dict[str, Any], override: str) -> None:
    """Set one ``key.sub=value`` in ``record``; a number in the key counts into a list from 0.

    Raises:
        InputError: when the text has no ``=`` or the key runs through something that has no keys.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override {override!r} is not of the form key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    value = without_comments(value, text)
    *parents, last = key.strip().split(".")
    node: Any = record
    for part in parents:
        node = _child(node, part, key)
    _set(node, last, value, key)


def without_comments(value: Any, typed: str) -> Any:
    """``value``, which YAML makes of what was typed; a text with a number sign is what was typed and not cut there."""
    typed = typed.strip()
    cut = value is None or isinstance(value, str)
    return typed if cut and re.search(r"(^|\s)#", typed) and not typed.startswith(("'", '"')) else value


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    return node[_position(node, part, key)]


def _set(node: Any, part: str, value: Any, key: str) -> None:
    if isinstance(node, dict):
        node[part] = value
    else:
        node[_position(node, part, key)] = value


def _position(node: Any, part: str, key: str) -> int:
    if not isinstance(node, list):
        raise InputError(f"override key {key}: what stands before {part!r} is a plain value and has no keys")
    if not part.isdigit() or int(part) >= len(node):
        raise InputError(f"override key {key}: {part!r} is no place in a list of {len(node)} (counted from 0)")
    return int(part)


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """The first error of a validation in one sentence, with its dotted key."""
    first = error.errors()[0]
    location = first["loc"]
    parts, _ = _walk(model, location)
    if first["type"] == "extra_forbidden":
        known = list(_walk(model, location[:-1])[1].model_fields)
        return f"unknown key {'.'.join(parts)}{_nearest(str(location[-1]), known)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "is missing"
    elif first["type"] == "literal_error":
        message = f"{first['input']!r} is not known; it can be {first['ctx']['expected']}"
    elif first["type"] == "union_tag_invalid":
        parts.append(first["ctx"]["discriminator"].strip("'"))
        message = f"{first['ctx']['tag']!r} is not known; it can be {first['ctx']['expected_tags']}"
    elif first["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, not {_short(repr(first['input']))}"
    return f"key {'.'.join(parts)}: {message}" if parts else message


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"


def _walk(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel]]:
    """The dotted key of ``location`` below ``model``, and the model there.

    Where a section is one of several kinds, pydantic puts the kind into the location; nobody wrote it as a key.
    """
    parts: list[str] = []
    kinds: dict[str, type[BaseModel]] = {}
    for part in location:
        if isinstance(part, str) and part in kinds:
            model, kinds = kinds[part], {}
            continue
        if part == "[key]":  # pydantic's word for "the key itself is wrong"
            continue
        parts.append(str(part))
        kinds = {}
        if isinstance(part, str) and part in model.model_fields:
            inside = list(_models(model.model_fields[part].annotation))
            model = inside[0] if inside else model
            if len(inside) > 1:
                kinds = {kind: one for one in inside for kind in _kinds(one)}
    return parts, model


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    field = model.model_fields.get("kind")
    return typing.get_args(field.annotation) if field else ()


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)
