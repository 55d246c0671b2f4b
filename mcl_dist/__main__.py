"""The `mcl` command: starts the command line, unless a foreign package shadows one of ours.

`launch` and `monitoring` are common names: ROS has a `launch`, and a folder of that name in the working folder is
enough to shadow ours. So the check is in this package, and the command line is imported by name.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

from mcl_dist.errors import EXIT_FAILURE

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "dataloading", "monitoring")


def main() -> int:
    """Run one command; 1, with one line on stderr, when a foreign package shadows one of ours."""
    for package in PACKAGES:
        if where := foreign(package):
            print(
                f"mcl: `{package}` is not ours: {where} hides {ROOT / package}; remove it from PYTHONPATH and the "
                "working folder, or install mcl-dist in an environment of its own",
                file=sys.stderr,
            )
            return EXIT_FAILURE
    return int(importlib.import_module("launch.cli.main").main())


def foreign(package: str) -> str | None:
    """Where Python finds one of our packages; None when that is beside this package."""
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    if places and Path(str(places[0])).resolve().is_relative_to(ROOT / package):
        return None
    return str(places[0]) if places else "nothing"


if __name__ == "__main__":
    sys.exit(main())
