"""Whether a dashboard is one by Grafana's published schema, as Grafana's Foundation SDK has it in Python."""

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


def problems(document: dict[str, Any]) -> list[str]:
    """What the schema does not know, and what is of another type than it says; nothing for a valid dashboard.

    The models of Grafana's kinds and panels are generated from that schema: whatever a model has no field for is
    lost when it is read and written again, and a field's type is the schema's.
    """
    model = Dashboard.from_json(document)
    written = json.loads(json.dumps(model, cls=JSONEncoder))
    return [*_lost(document, written, "dashboard"), *_of_other_type(model, Dashboard, "dashboard")]


def _lost(given: Any, written: Any, path: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(written, dict):
        for key, value in given.items():
            if key not in written and value is not None:
                yield f"{path}.{key}: unknown"
            elif key in written:
                yield from _lost(value, written[key], f"{path}.{key}")
    elif isinstance(given, list) and isinstance(written, list) and len(given) == len(written):
        for number, pair in enumerate(zip(given, written, strict=True)):
            yield from _lost(*pair, f"{path}[{number}]")
    elif given != written:
        yield f"{path}: {given!r} is read as {written!r}"


def _of_other_type(value: Any, hint: Any, path: str) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, object):
        if hasattr(value, "to_json"):  # what a kind of panel makes of its part
            yield from _parts_of_other_type(value, (), path)
    elif origin in (typing.Union, types.UnionType):
        if all(list(_of_other_type(value, each, path)) for each in arguments):
            yield from _of_other_type(value, arguments[0], path)
    elif (choices := _choices(hint)) is not None:
        if value not in choices:
            yield f"{path}: {value!r} is none of {choices}"
    elif type(value) is int and hint is float:
        return
    elif not isinstance(value, origin or hint) or (isinstance(value, bool) and hint is not bool):
        yield f"{path}: {value!r} is no {hint}"
    else:
        yield from _parts_of_other_type(value, arguments, path)


def _choices(hint: Any) -> list[Any] | None:
    """The values that a type names one by one."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    is_enum = isinstance(hint, type) and issubclass(hint, Enum)
    return [each.value for each in hint] if is_enum else None


def _parts_of_other_type(value: Any, arguments: tuple[Any, ...], path: str) -> Iterator[str]:
    """Of an object, a list or a mapping of the right type."""
    if hasattr(value, "to_json"):
        for name, inner in typing.get_type_hints(type(value)).items():
            yield from _of_other_type(getattr(value, name), inner, f"{path}.{name}")
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, item in items:
        yield from _of_other_type(item, arguments[-1], f"{path}[{key!r}]")
