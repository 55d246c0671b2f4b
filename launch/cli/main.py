"""The `mcl` command."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from mcl_dist.distributed.shutdown import EXIT_INTERRUPTED
from mcl_dist.errors import EXIT_FAILURE, UserError

COMMANDS = ("demo", "doctor", "shards", "pretrain", "monitor", "evaluate", "report", "export", "bench")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; the module of each command adds its own part."""
    root = argparse.ArgumentParser(prog="mcl", description="Motion-focused contrastive video pre-training.")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"launch.cli.{name}").register(commands)
    return root


def main(command_line: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; print a UserError as one line on standard error."""
    arguments = _parse(command_line)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"mcl: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("mcl: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (`mcl … | head`), and Python would report that again at exit.
        sys.stderr.close()
        return EXIT_FAILURE


def _parse(command_line: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line in which `key=value` may stand anywhere; argparse allows a single group of them."""
    root = parser()
    arguments, rest = root.parse_known_args(command_line)
    if rest:
        if not hasattr(arguments, "overrides") or any(text.startswith("-") or "=" not in text for text in rest):
            root.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
