"""`mcl pretrain --hostfile`: its options, and the controller that they describe."""

import argparse
import os
import shutil

from launch.cluster import ssh
from launch.cluster.controller import Controller
from launch.cluster.environment import forwarded_environment
from launch.cluster.hostfile import Host, read_hostfile
from launch.supervision.node_discovery import DEFAULT_PORT
from mcl_dist.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for many hosts."""
    group = parser.add_argument_group("many hosts")
    group.add_argument("--hostfile", metavar="FILE", help="train on these hosts: one `HOST slots=N` a line")
    group.add_argument("--launcher", choices=("pdsh", "ssh"), help="(default: pdsh where it is installed)")
    group.add_argument("--min-nodes", type=int, metavar="M", help="continue with M hosts or more (default: all)")
    group.add_argument(
        "--node-wait", type=float, default=600.0, metavar="SECONDS", help="for a host that does not answer (600)"
    )
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
    launcher = _pick_launcher(arguments.launcher)
    config = load_config(PretrainConfig, arguments.config, arguments.overrides)
    min_hosts = arguments.min_nodes or len(hosts)
    if not 1 <= min_hosts <= len(hosts):
        raise ConfigError(f"--min-nodes: found {min_hosts}, must be from 1 to the {len(hosts)} hosts of the hostfile")
    controller = Controller(
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
    )
    return controller.run()


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


def _pick_launcher(name: str | None) -> str:
    launcher = name or ("pdsh" if shutil.which("pdsh") else "ssh")
    if not shutil.which(launcher):
        raise ConfigError(f"--launcher: {launcher} is not installed here; install it, or choose the other")
    return launcher
