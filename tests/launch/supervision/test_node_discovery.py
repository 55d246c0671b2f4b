"""This node's place in the run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import pytest

from launch.supervision.deepspeed_launcher import NodeSpec
from launch.supervision.node_discovery import DEFAULT_PORT, add_node_arguments, node_spec_of
from mcl_dist.errors import ConfigError

SLURM = {"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "3"}
PYTORCHJOB = {"PET_NNODES": "2", "RANK": "1", "MASTER_ADDR": "mcl-master-0", "MASTER_PORT": "23456"}


def node_spec(options: str, environment: Mapping[str, str]) -> NodeSpec:
    parser = argparse.ArgumentParser()
    add_node_arguments(parser)
    return node_spec_of(parser.parse_args(["--ranks", "8", *options.split()]), environment)


def test_a_node_is_alone_by_default() -> None:
    assert node_spec("", {}) == NodeSpec(8)
    assert node_spec("--node-rank 5 --master-addr a", {"MASTER_PORT": "1"}) == NodeSpec(8)


def test_slurm_numbers_the_nodes() -> None:
    assert node_spec("--master-addr n1", SLURM) == NodeSpec(8, 4, 3, "n1", DEFAULT_PORT)


def test_a_pytorchjob_names_the_rendezvous() -> None:
    assert node_spec("--node-rank 1", PYTORCHJOB) == NodeSpec(8, 2, 1, "mcl-master-0", 23456)
    torchrun = {**PYTORCHJOB, "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "7"}
    assert node_spec("", torchrun) == NodeSpec(8, 2, 0, "a", 7)


def test_the_command_line_wins_over_the_environment() -> None:
    options = "--nodes 3 --node-rank 0 --master-addr here --master-port 1234"
    assert node_spec(options, {**SLURM, **PYTORCHJOB}) == NodeSpec(8, 3, 0, "here", 1234)


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ("--master-addr a", {**SLURM, "SLURM_NODEID": "one"}, "SLURM_NODEID: found 'one' in the environment"),
        ("", {"NNODES": "2.5"}, "NNODES: found '2.5' in the environment, must be a whole number"),
        ("--node-rank 0", {**PYTORCHJOB, "MASTER_PORT": "http"}, "MASTER_PORT: found 'http'"),
        ("--nodes 2 --master-addr a", {}, "--node-rank: found None, must be from 0 to 1 with --nodes 2"),
        ("--nodes 2 --node-rank 2 --master-addr a", {}, "--node-rank: found 2, must be from 0 to 1"),
        ("--nodes 2 --node-rank -1 --master-addr a", {}, "--node-rank: found -1, must be from 0 to 1"),
        ("--nodes 2 --node-rank 0", {}, "--master-addr: missing"),
    ],
)
def test_a_number_or_address_that_is_wrong_or_missing_is_an_error_of_the_configuration(
    options: str, environment: Mapping[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        node_spec(options, environment)
    assert str(raised.value).startswith(message)
