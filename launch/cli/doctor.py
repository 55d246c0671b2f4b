"""`mcl doctor`: check whether this machine, or all hosts of a hostfile, can train together; print a table."""

import argparse
import json
from collections.abc import Sequence

from launch.cli.command import Commands, add_command
from launch.cluster import ssh
from launch.cluster.doctor_checks import FAIL, CheckResult
from launch.cluster.hostfile import read_hostfile
from mcl_dist.errors import EXIT_FAILURE

EXAMPLE = """example:
  mcl doctor
  mcl doctor --hostfile hosts --config configs/pretrain/kinetics400.yaml data.train=s3://bucket/train
"""


def register(commands: Commands) -> None:
    """Add `mcl doctor`."""
    parser = add_command(commands, "doctor", run, help="find what keeps nodes from training together", example=EXAMPLE)
    parser.add_argument("--hostfile", metavar="FILE", help="one `HOST slots=N` a line (default: this machine alone)")
    parser.add_argument("--config", help="also check the stores, folders and ports of this configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the file, e.g. run.dir=runs/a")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="port of the rendezvous (default: a free one)")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds for the nodes to connect (default: 20)")
    parser.add_argument("--json", action="store_true", help="print the rows as a JSON list")
    ssh.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; returns 1 if any check fails."""
    from launch.cluster.doctor_diagnostics import Diagnostics

    hosts = read_hostfile(arguments.hostfile) if arguments.hostfile else None
    config = None
    if arguments.config or arguments.overrides:
        from launch.run.config import PretrainConfig
        from mcl_dist.config import load_config

        config = load_config(PretrainConfig, arguments.config, arguments.overrides)
    rows = Diagnostics(hosts, ssh.from_arguments(arguments), config, arguments.master_port, arguments.timeout).run()
    print(json.dumps([row._asdict() for row in rows], indent=1) if arguments.json else format_table(rows))
    return EXIT_FAILURE if any(row.state == FAIL for row in rows) else 0


def format_table(rows: Sequence[CheckResult]) -> str:
    """The rows in aligned columns, each remedy after what was found."""
    lines = [("check", "node", "", "found")]
    lines += [
        (row.check, row.node, row.state, f"{row.found}; {row.remedy}" if row.remedy else row.found) for row in rows
    ]
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:-1]]
    return "\n".join("  ".join((*map(str.ljust, line[:-1], widths), line[-1])).rstrip() for line in lines)
