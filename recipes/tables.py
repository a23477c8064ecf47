"""Turning TOML tables into dataclasses: unknown keys, missing keys and wrong types are errors."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tokexport.errors import RecipeError, nearest

T = TypeVar("T")


def parse_table(cls: type[T], table: object, where: str) -> T:
    """Make the dataclass ``cls`` from a TOML table; ``where`` names the table in errors.

    Raises:
        RecipeError: a key is unknown or missing, or a value has the wrong type.
    """
    assert is_dataclass(cls)
    if not isinstance(table, Mapping):
        raise RecipeError(f"{where} must be a table, not {_shown(table)}")
    known = {item.name: item for item in fields(cls)}
    for key in table:
        if key not in known:
            raise RecipeError(f"{where} has no key {key!r}{nearest(str(key), list(known))}")
    for name, item in known.items():
        if name not in table and item.default is MISSING and item.default_factory is MISSING:
            raise RecipeError(f"{where} needs the key {name!r}")
    hints = get_type_hints(cls)
    return cls(**{key: _parse_value(hints[key], value, f"{where} {key}") for key, value in table.items()})


def table_of(value: object) -> Any:
    """Return dataclasses as plain tables, every default filled in, ready to be written as TOML."""
    if is_dataclass(value) and not isinstance(value, type):
        items = ((item.name, table_of(getattr(value, item.name))) for item in fields(value))
        return {name: entry for name, entry in items if entry is not None}
    if isinstance(value, Mapping):
        return {str(key): table_of(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [table_of(entry) for entry in value]
    return value


def _parse_value(hint: Any, value: object, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in args:
            raise RecipeError(f"{where} = {_shown(value)} is not known{nearest(str(value), [str(a) for a in args])}")
        return value
    if origin in (Union, types.UnionType):
        return _parse_union(args, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where} must be a list, not {_shown(value)}")
        return tuple(_parse_value(args[0], entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if isinstance(hint, type) and is_dataclass(hint):
        return parse_table(hint, value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where} must be a table, not {_shown(value)}")
        return {key: _parse_value(args[1], entry, f"{where} {key}") for key, entry in value.items()}
    return _parse_scalar(hint, value, where)


def _parse_union(args: tuple[Any, ...], value: object, where: str) -> Any:
    # An int is also a float, but "keep = 1" and "keep = 1.0" mean different things: exact types first.
    for choice in args:
        if choice in (int, float, str, bool) and type(value) is choice:
            return value
    remaining = [choice for choice in args if choice is not type(None)]
    if len(remaining) == 1:
        return _parse_value(remaining[0], value, where)
    raise RecipeError(
        f"{where} must be {' or '.join(_TYPE_WORDS.get(c, str(c)) for c in remaining)}, not {_shown(value)}"
    )


def _parse_scalar(hint: Any, value: object, where: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise RecipeError(f"{where} must be {_TYPE_WORDS.get(hint, str(hint))}, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


_TYPE_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
