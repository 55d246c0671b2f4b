"""This node's place in the run, from the command line or from the environment of Slurm or a PyTorchJob."""

import argparse
import os
from collections.abc import Mapping

from launch.supervision.deepspeed_launcher import NodeSpec
from mcl_dist.errors import ConfigError

NUM_NODES = ("SLURM_STEP_NUM_NODES", "PET_NNODES", "NNODES")
NODE_RANK = ("SLURM_NODEID", "PET_NODE_RANK", "NODE_RANK")
ADDRESS, PORT = ("PET_MASTER_ADDR", "MASTER_ADDR"), ("PET_MASTER_PORT", "MASTER_PORT")
DEFAULT_PORT = 29500


def add_node_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a single node."""
    parser.add_argument("--ranks", type=int, help="processes on this machine (default: its GPUs, or 1 without any)")
    parser.add_argument("--nodes", type=int, help="machines that train together, each with this command (default 1)")
    parser.add_argument("--node-rank", type=int, help="this machine's number, from 0")
    parser.add_argument("--master-addr", help="name or address of machine 0")
    parser.add_argument("--master-port", type=int, help=f"port of the rendezvous on machine 0 (default {DEFAULT_PORT})")
    parser.add_argument("--runtime", help="local folder for heartbeats, stop requests and the outcome")
    parser.add_argument("--attached", action="store_true", help="stop at the end of standard input; print the outcome")


def node_spec_of(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> NodeSpec:
    """The node that the command line describes; the environment fills in missing options.

    Raises:
        ConfigError: a number is missing, malformed or out of range, or the address is missing.
    """
    import torch

    num_ranks = arguments.ranks or torch.cuda.device_count() or 1
    num_nodes = arguments.nodes or _number(environment, NUM_NODES) or 1
    if num_nodes == 1:
        return NodeSpec(num_ranks)
    node_rank = arguments.node_rank if arguments.node_rank is not None else _number(environment, NODE_RANK)
    address = arguments.master_addr or _first(environment, ADDRESS)[1]
    if node_rank is None or not 0 <= node_rank < num_nodes:
        raise ConfigError(f"--node-rank: found {node_rank}, must be from 0 to {num_nodes - 1} with --nodes {num_nodes}")
    if not address:
        raise ConfigError(f"--master-addr: missing; give the name of machine 0 of the {num_nodes}")
    port = arguments.master_port or _number(environment, PORT) or DEFAULT_PORT
    return NodeSpec(num_ranks, num_nodes, node_rank, address, port)


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
