"""`mcl` itself: hands over to the command line, unless another package of that name hides it.

It stands here, and finds the command line by name, because `launch` and `monitoring` are common names: ROS has a
`launch`, and a folder called so beside the work is enough.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from mcl_dist.errors import EXIT_FAILURE

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "dataloading", "monitoring")


def main() -> int:
    """Run one command; 1 with one line when a package of ours is hidden by a foreign one."""
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
    """Where Python finds a package that should be ours, if not beside this one."""
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    if places and Path(str(places[0])).resolve().is_relative_to(ROOT / package):
        return None
    return str(places[0]) if places else "nothing"


if __name__ == "__main__":
    sys.exit(main())
