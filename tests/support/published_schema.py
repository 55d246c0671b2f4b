"""Validate a dashboard against Grafana's published schema, through the models of Grafana's Foundation SDK."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

register_default_plugins()


def schema_errors(dashboard: dict[str, Any]) -> list[str]:
    """Unknown fields and wrong types of a dashboard; empty if it is valid.

    The SDK's models are generated from the schema. A field that a model does not know is lost when the dashboard is
    read and written again, and the type of a model's field is the schema's type.
    """
    model = Dashboard.from_json(dashboard)
    written = json.loads(json.dumps(model, cls=JSONEncoder))
    return [*_unknown_fields(dashboard, written, "dashboard"), *_wrong_types(model, Dashboard, "dashboard")]


def _unknown_fields(given: Any, written: Any, path: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(written, dict):
        for key, value in given.items():
            if key not in written and value is not None:
                yield f"{path}.{key}: unknown"
            elif key in written:
                yield from _unknown_fields(value, written[key], f"{path}.{key}")
    elif isinstance(given, list) and isinstance(written, list) and len(given) == len(written):
        for number, pair in enumerate(zip(given, written, strict=True)):
            yield from _unknown_fields(*pair, f"{path}[{number}]")
    elif given != written:
        yield f"{path}: {given!r} is read as {written!r}"


def _wrong_types(value: Any, hint: Any, path: str) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, object):
        if hasattr(value, "to_json"):  # a part that a panel plugin defines
            yield from _wrong_part_types(value, (), path)
    elif origin in (typing.Union, types.UnionType):
        if all(list(_wrong_types(value, each, path)) for each in arguments):
            yield from _wrong_types(value, arguments[0], path)
    elif (choices := _choices(hint)) is not None:
        if value not in choices:
            yield f"{path}: {value!r} is not one of {choices}"
    elif type(value) is int and hint is float:
        return
    elif not isinstance(value, origin or hint) or (isinstance(value, bool) and hint is not bool):
        yield f"{path}: {value!r} is not a {hint}"
    else:
        yield from _wrong_part_types(value, arguments, path)


def _choices(hint: Any) -> list[Any] | None:
    """The values of a Literal or Enum type; None for other types."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    is_enum = isinstance(hint, type) and issubclass(hint, Enum)
    return [each.value for each in hint] if is_enum else None


def _wrong_part_types(value: Any, arguments: tuple[Any, ...], path: str) -> Iterator[str]:
    """Wrong types inside an object, list or mapping."""
    if hasattr(value, "to_json"):
        for name, inner in typing.get_type_hints(type(value)).items():
            yield from _wrong_types(getattr(value, name), inner, f"{path}.{name}")
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, item in items:
        yield from _wrong_types(item, arguments[-1], f"{path}[{key!r}]")
