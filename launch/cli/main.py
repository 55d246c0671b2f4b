"""The `mcl` command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from mcl_dist.errors import EXIT_FAILURE, UserError

COMMANDS = ("demo", "doctor", "shards", "pretrain", "monitor", "evaluate", "report", "export", "bench")
EXIT_INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


def parser() -> argparse.ArgumentParser:
    """The whole command line; every module of `COMMANDS` adds its own part."""
    root = argparse.ArgumentParser(prog="mcl", description="Motion-focused contrastive video pre-training.")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"launch.cli.{name}").register(commands)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake becomes one line on standard error and its exit code."""
    parsed = _parsed(arguments)
    try:
        return int(parsed.run(parsed))
    except UserError as error:
        print(f"mcl: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("mcl: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`mcl … | head`): nothing is left to say.
        sys.stderr.close()
        return EXIT_FAILURE


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `key=value` may stand anywhere, where argparse takes one row of them alone."""
    root = parser()
    parsed, left = root.parse_known_args(arguments)
    if left:
        if not hasattr(parsed, "overrides") or any(word.startswith("-") or "=" not in word for word in left):
            root.error(f"unrecognized arguments: {' '.join(left)}")
        parsed.overrides = [*parsed.overrides, *left]
    return parsed


if __name__ == "__main__":
    sys.exit(main())
