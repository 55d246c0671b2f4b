from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mcl_dist.config import build_config, byte_size, choice, dump_config, load_config, number
from mcl_dist.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = number(0.1, minimum=0, maximum=1)
    kind: str = choice("one", "two")
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    name: str
    steps: int | None = number(None, minimum=1)
    inner: Inner = field(default_factory=Inner)


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_overrides_its_base_and_the_command_line_overrides_both(tmp_path: Path) -> None:
    write(tmp_path, "name: base\ninner: {rate: 0.2, kind: two}\n", "base.yaml")
    path = write(tmp_path, "base: base.yaml\ninner: {rate: 0.3}\n")
    config = load_config(Outer, path, ["steps=5", "inner.sizes=[3, 4]"])
    assert config == Outer("base", 5, Inner(0.3, "two", (3, 4)))


def test_a_number_in_scientific_notation_is_a_number(tmp_path: Path) -> None:
    assert load_config(Outer, write(tmp_path, "name: x\ninner: {rate: 1e-4}\n")).inner.rate == 1e-4


def test_a_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = Outer("x", 3, Inner(sizes=(7,)))
    assert load_config(Outer, write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "x", "innner": {}}, r"innner: unknown key; did you mean `inner`\?"),
        ({"name": "x", "inner": {"rat": 1}}, r"inner\.rat: unknown key; did you mean `rate`\?"),
        ({"name": 3}, "name: found 3, must be text"),
        ({"name": "x", "steps": "many"}, "steps: found 'many', must be a whole number at least 1"),
        ({"name": "x", "steps": 0}, "steps: found 0, must be a whole number at least 1"),
        ({"name": "x", "steps": True}, "steps: found True, must be a whole number"),
        ({"name": "x", "inner": {"rate": 2}}, r"inner\.rate: found 2\.0, must be a number at least 0 and at most 1"),
        ({"name": "x", "inner": {"rate": float("nan")}}, r"inner\.rate: found nan"),
        ({"name": "x", "inner": {"kind": "tow"}}, "inner.kind: found 'tow'; did you mean `two`"),
        ({"name": "x", "inner": {"sizes": [1, "a"]}}, r"inner\.sizes\[1\]: found 'a', must be a whole number"),
        ({"name": "x", "inner": 5}, "inner: found 5, must be a section"),
        ({}, "name: missing"),
    ],
)
def test_an_error_gives_the_key_the_value_found_and_what_is_allowed(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(Outer, tree)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("name: [", [], "not YAML"),
        ("- name\n", [], "must hold `key: value` lines"),
        ("base: run.yaml\n", [], "leads back"),
        ("name: x\n", ["steps"], "written key=value"),
        ("name: x\n", ["name.first=y"], "is a value, not a section"),
    ],
)
def test_a_malformed_file_or_override_is_rejected(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, write(tmp_path, text), overrides)


def test_a_missing_file_is_an_error_with_its_name() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config(Outer, "nowhere.yaml")


@dataclass(frozen=True)
class Cache:
    limit: int | None = byte_size(None)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("500", 500), ("200GB", 200_000_000_000), ("1.5 TiB", 3 * 2**39), ("64k", 64_000), (7, 7), (None, None)],
)
def test_a_number_of_bytes_may_have_a_unit(text: object, num_bytes: int | None) -> None:
    assert build_config(Cache, {"limit": text}).limit == num_bytes


@pytest.mark.parametrize("value", ["many", "-1GB", "3XB", 0, 1.5])
def test_an_invalid_number_of_bytes_is_rejected(value: object) -> None:
    with pytest.raises(ConfigError, match=r"limit: found .*, must be a number of bytes, for example 200GB"):
        build_config(Cache, {"limit": value})
