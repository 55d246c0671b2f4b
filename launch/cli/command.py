"""How a module adds its command to `mcl`."""

import argparse
import textwrap
from collections.abc import Callable, Mapping
from typing import TypeAlias

from mcl_dist.errors import ConfigError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    example: str,
    description: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command that calls `run`, with an example below its options; the caller adds the arguments."""
    parser = commands.add_parser(
        name,
        help=help,
        description=description and textwrap.fill(description, 100),
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def check_minimums(args: argparse.Namespace, minimums: Mapping[str, int]) -> None:
    """Raise ConfigError for the first argument that is less than its minimum."""
    for name, least in minimums.items():
        if (value := getattr(args, name)) < least:
            raise ConfigError(f"--{name.replace('_', '-')}: found {value}, must be at least {least}")
