"""Strict configuration: dataclasses beside the code they configure, YAML files, dotted overrides.

A section is a frozen dataclass. Its fields have a type, a default and optional constraints (`number`, `choice`,
`byte_size`). A YAML file may inherit from another with `base:`, a path relative to itself.
"""

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mcl_dist.errors import ConfigError

Section = TypeVar("Section")
RUN_CONFIG = "config.yaml"  # in a run folder: the resolved configuration
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(?:([kKMGTP])(i?))?B?")


def number(default: Any = dataclasses.MISSING, *, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A numeric field with inclusive limits; required when no default is given."""
    return dataclasses.field(default=default, metadata={"minimum": minimum, "maximum": maximum})


def choice(default: str, *options: str) -> Any:
    """A text field that takes one of the given options."""
    return dataclasses.field(default=default, metadata={"options": (default, *options)})


def byte_size(default: int | None) -> Any:
    """A number of bytes, also written with a unit: 500MB, 1.5TB or 200GiB."""
    return dataclasses.field(default=default, metadata={"minimum": 1, "bytes": True})


def load_config(schema: type[Section], path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Section:
    """Build `schema` from a YAML file (None: defaults only) and `key=value` overrides, applied in order.

    Raises:
        ConfigError: with the file or override, the key's full path, the value found and what is allowed.
    """
    tree = {} if path is None else _read(Path(path), seen=())
    for override in overrides:
        _apply_override(tree, override)
    return build_config(schema, tree)


def build_config(schema: type[Section], tree: dict[str, Any]) -> Section:
    """Build `schema` from nested dictionaries; errors as in `load_config`."""
    return typing.cast(Section, _build_section(schema, tree, path=""))


def dump_config(config: Any) -> str:
    """The resolved configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `base:` leads back to this file; remove the cycle")
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())}); fix that line") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, must hold `key: value` lines")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(_read(path.parent / str(base), (*seen, path)), tree)


def _merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"`{override}`: an override is written key=value, for example train.epochs=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"`{override}`: the value is not YAML; quote it") from error
    *sections, last = key.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: `{section}` is a value, not a section")
        tree = inner
    tree[last] = value


def _build_section(schema: Any, tree: Any, path: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found {tree!r}, must be a section of `key: value` lines")
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key in tree:
        if key not in fields:
            raise ConfigError(f"{_join_path(path, str(key))}: unknown key; {_nearest(str(key), list(fields))}")
    hints = typing.get_type_hints(schema)
    values = {}
    for name, field in fields.items():
        where = _join_path(path, name)
        if name in tree:
            values[name] = _build_value(hints[name], tree[name], where, field.metadata)
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = _build_section(hints[name], {}, where)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: missing; set it in the file or as {where}=VALUE")
    return schema(**values)


def _build_value(hint: Any, value: Any, path: str, metadata: typing.Mapping[str, Any]) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in hint.__args__:
            return None
        (hint,) = (inner for inner in hint.__args__ if inner is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build_section(hint, value, path)
    if typing.get_origin(hint) is tuple:
        return _build_tuple(typing.get_args(hint), value, path, metadata)
    if hint is float:
        value = _as_float(value)
    if metadata.get("bytes"):
        value = _as_bytes(value)
    if type(value) is not hint:
        raise ConfigError(f"{path}: found {value!r}, must be {_allowed(hint, metadata)}")
    _check_limits(value, path, hint, metadata)
    return value


def _build_tuple(inner: tuple[Any, ...], value: Any, path: str, metadata: typing.Mapping[str, Any]) -> Any:
    repeated = inner[-1] is Ellipsis
    if not isinstance(value, list | tuple) or (not repeated and len(value) != len(inner)):
        size = "" if repeated else f"{len(inner)} "
        raise ConfigError(f"{path}: found {value!r}, must be a list of {size}{_allowed(inner[0], metadata)}")
    return tuple(_build_value(inner[0], item, f"{path}[{index}]", metadata) for index, item in enumerate(value))


def _as_float(value: Any) -> Any:
    """Whole numbers are floats too, and so are texts like 1e-4, which YAML 1.1 parses as strings."""
    if isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _as_bytes(value: Any) -> Any:
    """The number of bytes in a text like 200GB; other values unchanged."""
    match = _BYTES.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    amount, letter, is_binary = float(match[1]), match[2], match[3]
    return int(amount * (1024 if is_binary else 1000) ** ("kmgtp".index(letter.lower()) + 1 if letter else 0))


def _check_limits(value: Any, path: str, hint: Any, metadata: typing.Mapping[str, Any]) -> None:
    minimum, maximum, options = (metadata.get(key) for key in ("minimum", "maximum", "options"))
    below = minimum is not None and not value >= minimum
    above = maximum is not None and not value <= maximum
    if below or above:
        raise ConfigError(f"{path}: found {value!r}, must be {_allowed(hint, metadata)}")
    if options is not None and value not in options:
        raise ConfigError(f"{path}: found {value!r}; {_nearest(value, list(options))}")


def _allowed(hint: Any, metadata: typing.Mapping[str, Any]) -> str:
    if metadata.get("bytes"):
        return "a number of bytes, for example 200GB"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    minimum, maximum = metadata.get("minimum"), metadata.get("maximum")
    limits = [f"at least {minimum}"] if minimum is not None else []
    limits += [f"at most {maximum}"] if maximum is not None else []
    return " ".join([names[hint], " and ".join(limits)]).strip()


def _nearest(found: str, known: list[str]) -> str:
    close = difflib.get_close_matches(found, known, n=1)
    hint = f"did you mean `{close[0]}`? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"


def _join_path(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
