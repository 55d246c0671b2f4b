"""What the repository promises beside its code: make targets, pins, documents that name real files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli.main import main
from tests.support.paths import REPOSITORY

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def _make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def _stamp(clone: Path, cuda: int) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / f".installed-cuda{cuda}").touch()


@needs_make
@pytest.mark.parametrize("target", ["install", "demo", "test", "check"])
def test_every_target_installs_first_where_there_is_no_environment(clone: Path, target: str) -> None:
    plan = _make(clone, "--dry-run", target).stdout
    assert plan.index("-m venv") < plan.index("-c constraints.txt  torch") < plan.index("-e '.[cuda13,demo,dev,s3]'")


@needs_make
def test_a_second_call_installs_nothing(clone: Path) -> None:
    _stamp(clone, 13)
    assert "pip" not in _make(clone, "--dry-run", "test").stdout


@needs_make
def test_a_half_made_environment_does_not_count(clone: Path) -> None:
    (clone / ".venv" / "bin").mkdir(parents=True)
    assert "-m venv --clear" in _make(clone, "--dry-run", "test").stdout


@needs_make
def test_the_choice_of_cuda_is_kept_for_later_calls(clone: Path) -> None:
    assert "'.[cuda12," in _make(clone, "--dry-run", "install", "CUDA=12").stdout
    _stamp(clone, 12)
    assert "pip" not in _make(clone, "--dry-run", "demo").stdout


@needs_make
@pytest.mark.parametrize(
    ("setting", "says"), [("CUDA=11", "must be 12 or 13"), ("PYTHON=python3.99", "no such program")]
)
def test_a_setting_that_cannot_be_is_told_before_anything_is_made(clone: Path, setting: str, says: str) -> None:
    result = _make(clone, "install", setting)
    assert result.returncode != 0
    assert says in result.stderr.splitlines()[0]
    assert not (clone / ".venv").exists()


@needs_make
def test_a_python_out_of_range_is_told_with_its_version(clone: Path) -> None:
    old = clone / "python3.9"
    old.write_text('#!/bin/sh\ncase "$1" in -V) echo Python 3.9.1;; *) exit 1;; esac\n')
    old.chmod(0o755)
    result = _make(clone, "install", f"PYTHON={old}")
    assert "is Python 3.9.1; name one of 3.10 to 3.13" in result.stderr
    assert not (clone / ".venv").exists()


def test_torch_and_what_we_build_on_are_pinned_exactly() -> None:
    pins = (REPOSITORY / "constraints.txt").read_text()
    for name in ("torch", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "webdataset"):
        assert re.search(rf"^{name}==[\d.]+$", pins, re.MULTILINE), name


@pytest.fixture
def tree() -> set[str]:
    """Paths that the README's tree names."""
    found = re.search(r"```\nmcl-dist/\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert found
    paths, folder = set(), ""
    for line in found[1].splitlines():
        name = line.split()[0]
        is_inside = line.startswith(" " * 4)
        folder = folder if is_inside else name
        paths.add(folder + name if is_inside else name)
    return paths


def test_every_file_of_the_readmes_tree_exists(tree: set[str]) -> None:
    assert not [path for path in tree if not (REPOSITORY / path).exists()]


def test_every_module_stands_in_the_readmes_tree(tree: set[str]) -> None:
    packages = ("mcl_dist", "dataloading", "monitoring", "launch")
    modules = (path for package in packages for path in (REPOSITORY / package).rglob("*.py"))
    own = {str(path.relative_to(REPOSITORY)) for path in modules if path.name != "__init__.py"}
    assert not own - tree


@pytest.mark.parametrize(
    "words", ["", "demo", "pretrain", "evaluate linear", "shards build", "shards inspect", "monitor"]
)
def test_every_command_has_help_with_an_example(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*words.split(), "--help"])
    assert left.value.code == 0
    assert ("example:" in capsys.readouterr().out) == bool(words)


@pytest.mark.parametrize(
    ("what", "heavy"),
    [
        ("import launch.cli.main; launch.cli.main.parser()", {"torch", "deepspeed", "nvidia", "cv2", "sklearn"}),
        ("import launch.run.config", {"torch._dynamo", "deepspeed", "nvidia", "sklearn"}),
    ],
)
def test_help_and_settings_load_no_heavy_library(what: str, heavy: set[str]) -> None:
    code = f"import sys; {what}; sys.exit(str({heavy} & set(sys.modules) or ''))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == ""
