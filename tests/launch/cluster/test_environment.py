"""What of the environment goes to other hosts."""

from __future__ import annotations

import pytest

from launch.cluster.environment import travelling
from mcl_dist.errors import ConfigError


def test_settings_and_paths_travel_and_secrets_do_not() -> None:
    here = {"NCCL_DEBUG": "INFO", "AWS_SECRET_ACCESS_KEY": "s", "AWS_PROFILE": "p", "HOME": "/root", "EXTRA": "1"}
    assert travelling(here, ["EXTRA"]) == {"NCCL_DEBUG": "INFO", "AWS_PROFILE": "p", "EXTRA": "1"}
    with pytest.raises(ConfigError, match="looks like a secret"):
        travelling(here, ["AWS_SECRET_ACCESS_KEY"])
    with pytest.raises(ConfigError, match="not set here"):
        travelling(here, ["ABSENT"])
