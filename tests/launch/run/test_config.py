from __future__ import annotations

import pytest

from launch.run.config import PretrainConfig, check
from mcl_dist.config import build_config
from mcl_dist.errors import ConfigError


def test_compile_is_refused_with_an_alignment_layer_that_needs_second_derivatives() -> None:
    tree = {
        "run": {"dir": "none"},
        "data": {"train": "none"},
        "train": {"compile": True},
        "objective": {"alignment_layer": "layer4.1.conv3"},
    }
    with pytest.raises(ConfigError, match=r"train\.compile: found true, must be false with objective\.alignment_layer"):
        check(build_config(PretrainConfig, tree), num_ranks=1)


@pytest.mark.parametrize(
    ("data", "evaluate", "message"),
    [
        ({"train": "none"}, {"every": 10}, r"evaluate\.test: missing"),
        ({"train": "none"}, {"test": "none"}, r"evaluate\.every: missing"),
        ({"sets": [{"url": "a"}, {"url": "b"}]}, {"every": 10, "test": "none"}, r"evaluate\.train: missing"),
    ],
)
def test_an_online_evaluation_without_a_set_or_an_interval_is_refused(
    data: dict[str, object], evaluate: dict[str, object], message: str
) -> None:
    config = build_config(PretrainConfig, {"run": {"dir": "none"}, "data": data, "evaluate": evaluate})
    with pytest.raises(ConfigError, match=message):
        check(config, num_ranks=1)
