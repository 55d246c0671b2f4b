from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, fields

import pytest

from dataloading.build.config import BuildConfig
from dataloading.flow.constants import BOUND
from launch.cli.config_flags import add_config_flags, attribute_descriptions, config_from_flags
from mcl_dist.config import choice, number
from mcl_dist.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Settings of a test.

    Attributes:
        mode: how to run.
        num_items: items, of which 10 %
            are dropped; 0 keeps all.
        share: share of the items.
        hidden: a field without a flag.

    Raises:
        ConfigError: never.
    """

    mode: str = choice("fast", "slow")
    num_items: int = number(3, minimum=0)
    share: float | None = number(None, minimum=0.25, maximum=1.0)
    hidden: int = 7


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--other", default="ignored")
    add_config_flags(parser, Settings, exclude=("hidden",))
    return parser


def test_without_flags_every_field_has_its_default(parser: argparse.ArgumentParser) -> None:
    assert config_from_flags(Settings, parser.parse_args([])) == Settings()


def test_flags_are_parsed_to_the_types_of_their_fields(parser: argparse.ArgumentParser) -> None:
    arguments = parser.parse_args(["--mode", "slow", "--num-items", "5", "--share", "0.5"])
    assert config_from_flags(Settings, arguments) == Settings("slow", 5, 0.5)


def test_an_excluded_field_has_no_flag(parser: argparse.ArgumentParser) -> None:
    assert "hidden" not in parser.format_help()


def test_the_help_has_description_options_limits_and_default(parser: argparse.ArgumentParser) -> None:
    text = " ".join(parser.format_help().split())
    assert "--mode {fast,slow} how to run (default: fast)" in text
    assert "items, of which 10 % are dropped; 0 keeps all (at least 0, default: 3)" in text
    assert "share of the items (0.25 to 1.0)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-items", "-1"], r"^--num-items: found -1, must be a whole number at least 0$"),
        (["--mode", "slwo"], r"^--mode: found 'slwo'; did you mean `slow`\?"),
    ],
)
def test_an_error_names_the_flag(parser: argparse.ArgumentParser, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_flags(Settings, parser.parse_args(arguments))


def test_every_build_setting_has_a_default_and_a_description() -> None:
    names = [field.name for field in fields(BuildConfig)]
    assert list(attribute_descriptions(BuildConfig)) == names
    assert all(field.default is not MISSING for field in fields(BuildConfig))


def test_the_manifest_records_the_resolved_settings() -> None:
    assert list(BuildConfig().record().items()) == [
        ("flow", "tvl1"),
        ("seed", 0),
        ("short_side", 256),
        ("window", 32),
        ("map_window", 4),
        ("quality", 90),
        ("flow_quality", 95),
        ("shard_megabytes", 256),
        ("keep_every", 1),
        ("flow_size", 1.0),
        ("device", "cpu"),
        ("flow_bound", BOUND),
    ]
