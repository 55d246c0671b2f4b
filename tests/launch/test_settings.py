from __future__ import annotations

import pytest

from launch.settings import PretrainConfig, check
from mcl_dist.config import build_config
from mcl_dist.errors import ConfigError


def test_compiling_what_is_differentiated_twice_is_refused() -> None:
    tree = {
        "run": {"dir": "none"},
        "data": {"train": "none"},
        "train": {"compile": True},
        "objective": {"alignment_layer": "layer4.1.conv3"},
    }
    with pytest.raises(ConfigError, match=r"train\.compile: found true, must be false with objective\.alignment_layer"):
        check(build_config(PretrainConfig, tree), num_ranks=1)
