"""Command-line flags of a configuration dataclass: `short_side` becomes `--short-side`."""

import argparse
import re
import types
import typing
from collections.abc import Collection
from dataclasses import Field, fields
from typing import Any, TypeVar

from mcl_dist.config import build_config
from mcl_dist.errors import ConfigError

Section = TypeVar("Section")
ATTRIBUTE = re.compile(r"(\w+): (.+?)\.?$")


def add_config_flags(parser: argparse._ActionsContainer, schema: type[Any], exclude: Collection[str] = ()) -> None:
    """Add one flag for each field of the dataclass `schema` that is not in `exclude`.

    Its help is the field's description below `Attributes:` in the docstring, its limits and its default.
    """
    hints, descriptions = typing.get_type_hints(schema), attribute_descriptions(schema)
    for field in fields(schema):
        if field.name in exclude:
            continue
        options = field.metadata.get("options")
        parser.add_argument(
            flag(field.name),
            type=_parser_of(hints[field.name]),
            default=field.default,
            metavar=f"{{{','.join(options)}}}" if options else None,
            help=f"{descriptions[field.name]}{_limits_and_default(field)}".replace("%", "%%"),
        )


def config_from_flags(schema: type[Section], arguments: argparse.Namespace) -> Section:
    """Build the checked `schema` from parsed flags, ignoring other arguments; a ConfigError names the flag."""
    names = {field.name for field in fields(typing.cast(Any, schema))}
    try:
        return build_config(schema, {name: value for name, value in vars(arguments).items() if name in names})
    except ConfigError as error:
        name, colon, problem = str(error).partition(":")
        raise ConfigError(f"{flag(name)}{colon}{problem}") from error


def flag(name: str) -> str:
    """The flag of a field or parsed argument."""
    return f"--{name.replace('_', '-')}"


def attribute_descriptions(schema: type[Any]) -> dict[str, str]:
    """The descriptions of the attributes in a class docstring, each in one line without the final full stop."""
    _, _, section = (schema.__doc__ or "").partition("Attributes:\n")
    section = section.partition("\n\n")[0]
    lines = re.sub(r"\n {9,}", " ", section).splitlines()
    return {match[1]: match[2] for line in lines if (match := ATTRIBUTE.fullmatch(line.strip()))}


def _parser_of(hint: Any) -> Any:
    """The type of an option's value: `float` for `float | None`."""
    if isinstance(hint, types.UnionType):
        (hint,) = (inner for inner in typing.get_args(hint) if inner is not type(None))
    return hint


def _limits_and_default(field: Field[Any]) -> str:
    minimum, maximum = field.metadata.get("minimum"), field.metadata.get("maximum")
    limits = [] if minimum is None else [f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"]
    default = [f"default: {field.default}"] if field.default is not None else []
    return f" ({', '.join(limits + default)})"
