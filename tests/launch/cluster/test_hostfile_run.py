"""Environment variables that are forwarded to other hosts."""

from __future__ import annotations

import pytest

from launch.cluster.hostfile_run import forwarded_environment
from mcl_dist.errors import ConfigError


def test_settings_and_paths_are_forwarded_and_secrets_are_not() -> None:
    environment = {
        "NCCL_DEBUG": "INFO",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_PROFILE": "p",
        "HOME": "/root",
        "EXTRA": "1",
    }
    forwarded = {"NCCL_DEBUG": "INFO", "AWS_PROFILE": "p", "EXTRA": "1"}
    assert forwarded_environment(environment, ["EXTRA"]) == forwarded
    with pytest.raises(ConfigError, match="looks like a secret"):
        forwarded_environment(environment, ["AWS_SECRET_ACCESS_KEY"])
    with pytest.raises(ConfigError, match="not set here"):
        forwarded_environment(environment, ["ABSENT"])
