"""Configurations as JSON: frozen dataclasses of plain values, checked field by field against their annotations.

Nothing is ever imported or run because of what a file says: the expected type decides what is built. Where an
annotation allows several dataclasses, the JSON object names its own in "type".
"""

import math
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from varkit.errors import UserError, unknown_name

TAG = "type"
_NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as a dict of JSON values; tuples become lists."""
    hints = get_type_hints(type(config))
    return {f.name: _plain(getattr(config, f.name), hints[f.name]) for f in fields(config)}


def from_json(value: Any, expected: Any, where: str = "config") -> Any:
    """`value`, as `json.load` returns it, as an instance of `expected` (a dataclass, or any type a field may have).

    Raises `UserError` naming the field (a dotted path from `where`), its value and what is expected.
    """
    if is_dataclass(expected):
        return _dataclass(value, expected, where)
    origin, args = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        return _union(value, args, where)
    if origin is tuple and isinstance(value, list) and (args[-1] is ... or len(args) == len(value)):
        items = args[:1] * len(value) if args[-1] is ... else args
        return tuple(
            from_json(v, t, f"{where}[{i}]") for i, (v, t) in enumerate(zip(value, items, strict=True))
        )
    if expected is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if expected in _NAMES and expected is not float and type(value) is expected:
        return value
    raise UserError(f"{where} is {_short(value)}; it must be {_describe(expected)}")


def _plain(value: Any, hint: Any) -> Any:
    if is_dataclass(value):
        tag = {TAG: type(value).__name__} if len(_dataclasses(get_args(hint))) > 1 else {}
        return tag | to_json(value)
    if isinstance(value, tuple | list):
        return [_plain(v, None) for v in value]
    assert value is None or isinstance(value, bool | int | float | str), f"{value!r} has no JSON form"
    return value


def _dataclass(value: Any, expected: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {_short(value)}; it must be {_describe(expected)}")
    hints = get_type_hints(expected)
    known = [f.name for f in fields(expected)]
    for name in value:
        if name not in known:
            raise unknown_name("field", name, known, f"(in {where}, value {_short(value[name])})")
    for f in fields(expected):
        if f.name not in value and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{where} lacks the field {f.name!r}, which must be {_describe(hints[f.name])}")
    return expected(**{k: from_json(v, hints[k], f"{where}.{k}") for k, v in value.items()})


def _union(value: Any, members: Sequence[Any], where: str) -> Any:
    objects = _dataclasses(members)
    if isinstance(value, dict) and len(objects) == 1:
        return from_json(value, objects[0], where)
    if isinstance(value, dict) and objects:
        by_name = {t.__name__: t for t in objects}
        name = value.get(TAG)
        if name not in by_name:
            raise unknown_name(TAG, str(name), by_name, f"(in {where})")
        return from_json({k: v for k, v in value.items() if k != TAG}, by_name[name], where)
    for member in members:
        try:
            return from_json(value, member, where)
        except UserError:
            continue
    raise UserError(f"{where} is {_short(value)}; it must be {' or '.join(map(_describe, members))}")


def _dataclasses(members: Sequence[Any]) -> list[Any]:
    return [t for t in members if is_dataclass(t)]


def _describe(expected: Any) -> str:
    if expected in _NAMES:
        return _NAMES[expected]
    if is_dataclass(expected):
        return f"an object with the fields of {getattr(expected, '__name__', expected)}"
    args = get_args(expected)
    if get_origin(expected) is tuple:
        if args[-1] is ...:
            return f"a list, each item {_describe(args[0])}"
        return f"a list of {len(args)}: {', '.join(map(_describe, args))}"
    assert get_origin(expected) in (Union, UnionType), f"no JSON form for {expected}"
    return " or ".join(map(_describe, args))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
