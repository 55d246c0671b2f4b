"""`mcl pretrain --hostfile`: its options, the environment that it forwards, and the controller that they describe."""

import argparse
import os
import re
import shutil
from collections.abc import Mapping, Sequence

from launch.cluster import ssh
from launch.cluster.controller import Controller
from launch.cluster.hostfile import Host, read_hostfile
from launch.supervision.node_discovery import DEFAULT_PORT
from mcl_dist.errors import ConfigError

# Variables that are forwarded to the hosts: settings and paths, never secrets.
PREFIXES = ("NCCL_", "GLOO_", "OMP_", "MKL_", "TORCH_", "UCX_", "DALI_", "DS_")
NAMES = (
    "PYTHONPATH", "LD_LIBRARY_PATH", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "GOOGLE_APPLICATION_CREDENTIALS",
    "FSSPEC_CONFIG_DIR",
)  # fmt: skip
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|PRIVATE|API_?KEY", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for many hosts."""
    group = parser.add_argument_group("many hosts")
    group.add_argument("--hostfile", metavar="FILE", help="train on these hosts: one `HOST slots=N` a line")
    group.add_argument("--launcher", choices=("pdsh", "ssh"), help="(default: pdsh where it is installed)")
    group.add_argument("--min-nodes", type=int, metavar="M", help="continue with M hosts or more (default: all)")
    wait_help = "for a host that does not answer (600)"
    group.add_argument("--node-wait", type=float, default=600.0, metavar="SECONDS", help=wait_help)
    group.add_argument("--export", action="append", default=[], metavar="NAME", help="also forward this variable")
    ssh.add_arguments(group)


def run(arguments: argparse.Namespace) -> int:
    """Train on the hosts of a hostfile; returns the exit code.

    Raises:
        ConfigError: an option, the hostfile or the configuration is wrong.
        UserError: no restart is left, or too few hosts answer.
    """
    from launch.run.config import PretrainConfig, check
    from mcl_dist.config import load_config

    hosts = _read_hosts(arguments)
    launcher = arguments.launcher or ("pdsh" if shutil.which("pdsh") else "ssh")
    if not shutil.which(launcher):
        raise ConfigError(f"--launcher: {launcher} is not installed here; install it, or choose the other")
    config = load_config(PretrainConfig, arguments.config, arguments.overrides)
    min_hosts = arguments.min_nodes or len(hosts)
    if not 1 <= min_hosts <= len(hosts):
        raise ConfigError(f"--min-nodes: found {min_hosts}, must be from 1 to the {len(hosts)} hosts of the hostfile")
    return Controller(
        hosts=hosts,
        limits=config.supervise,
        check_num_ranks=lambda num_ranks: check(config, num_ranks),
        arguments=["--config", arguments.config, *arguments.overrides],
        ssh=ssh.from_arguments(arguments),
        launcher=launcher,
        min_hosts=min_hosts,
        wait_seconds=arguments.node_wait,
        port=arguments.master_port or DEFAULT_PORT,
        environment=forwarded_environment(os.environ, arguments.export),
    ).run()


def _read_hosts(arguments: argparse.Namespace) -> tuple[Host, ...]:
    """Read the hostfile; reject options that it replaces, and hosts with different slots."""
    for option in ("ranks", "nodes", "node_rank", "master_addr"):
        if (value := getattr(arguments, option)) is not None:
            name = f"--{option.replace('_', '-')}"
            raise ConfigError(f"{name}: found {value} beside --hostfile, which replaces it; leave one of them out")
    hosts = read_hostfile(arguments.hostfile)
    if len({host.slots for host in hosts}) > 1:
        found = ", ".join(f"{host.name} slots={host.slots}" for host in hosts)
        raise ConfigError(f"{arguments.hostfile}: {found}: all hosts must have the same number of slots")
    return hosts


def forwarded_environment(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """Variables of the allow-list, and those named in `more`.

    Raises:
        ConfigError: a variable in `more` is not set, or its name looks like a secret: command lines are public.
    """
    for name in more:
        if not NAME.fullmatch(name) or name not in environment:
            raise ConfigError(f"--export: {name!r} is not set here; name a variable of this environment")
        if SECRET.search(name) and not name.endswith(("_FILE", "_PATH", "_DIR")):
            problem = f"{name} looks like a secret, and all users of the hosts can read command lines"
            remedy = "put it in a file on the hosts and export the file's path, for example AWS_SHARED_CREDENTIALS_FILE"
            raise ConfigError(f"--export: {problem}; {remedy}")
    return {
        name: value
        for name, value in environment.items()
        if NAME.fullmatch(name)
        and (name in more or name in NAMES or (name.startswith(PREFIXES) and not SECRET.search(name)))
    }
