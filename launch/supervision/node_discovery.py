"""Which node of a run this is: from the command line, or from what Slurm or a PyTorchJob left in the environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from launch.supervision.deepspeed_launcher import NodeSpec
from mcl_dist.errors import ConfigError

NODES, NODE = ("SLURM_STEP_NUM_NODES", "PET_NNODES", "NNODES"), ("SLURM_NODEID", "PET_NODE_RANK", "NODE_RANK")
ADDRESS, PORT = ("PET_MASTER_ADDR", "MASTER_ADDR"), ("PET_MASTER_PORT", "MASTER_PORT")
DEFAULT_PORT = 29500


def add_node_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every node of a run is given."""
    parser.add_argument("--ranks", type=int, help="processes on this machine (default: its GPUs, or 1 without any)")
    parser.add_argument("--nodes", type=int, help="machines that train together, each with this command (default 1)")
    parser.add_argument("--node-rank", type=int, help="this machine's number, from 0")
    parser.add_argument("--master-addr", help="name or address of machine 0")
    parser.add_argument("--master-port", type=int, help=f"port at which machines meet there (default {DEFAULT_PORT})")
    parser.add_argument("--runtime", help="local folder for signs of life, requests to stop and the outcome")
    parser.add_argument("--attached", action="store_true", help="stop at the end of standard input; print the outcome")


def meeting_of(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> NodeSpec:
    """The node that the command line describes, and where it is silent the environment.

    Raises:
        ConfigError: a number is missing, or is none, or does not fit the others.
    """
    import torch

    num_ranks = arguments.ranks or torch.cuda.device_count() or 1
    nodes = arguments.nodes or _number(environment, NODES) or 1
    if nodes == 1:
        return NodeSpec(num_ranks)
    node = arguments.node_rank if arguments.node_rank is not None else _number(environment, NODE)
    address = arguments.master_addr or _first(environment, ADDRESS)[1]
    if node is None or not 0 <= node < nodes:
        raise ConfigError(f"--node-rank: found {node}, must be from 0 to {nodes - 1} with --nodes {nodes}")
    if not address:
        raise ConfigError(f"--master-addr: missing; give the name of machine 0, as there are {nodes}")
    port = arguments.master_port or _number(environment, PORT) or DEFAULT_PORT
    return NodeSpec(num_ranks, nodes, node, address, port)


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, str]:
    return next(((name, environment[name]) for name in names if environment.get(name)), ("", ""))


def _number(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    name, text = _first(environment, names)
    if not text:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name}: found {text!r} in the environment, must be a whole number") from error
