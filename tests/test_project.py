"""What the repository promises beside its code: pins, help texts, light imports."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from launch.cli.main import main
from tests.support.paths import REPOSITORY


def test_torch_and_the_libraries_with_internals_in_use_are_pinned_exactly() -> None:
    pins = (REPOSITORY / "constraints.txt").read_text()
    for name in ("torch", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "webdataset"):
        assert re.search(rf"^{name}==[\d.]+$", pins, re.MULTILINE), name


def test_no_folder_of_a_package_holds_more_than_sixteen_modules() -> None:
    packages = ("mcl_dist", "dataloading", "monitoring", "launch")
    folders = {path.parent for package in packages for path in (REPOSITORY / package).rglob("*.py")}
    assert {folder.name: count for folder in folders if (count := len(list(folder.glob("*.py")))) > 16} == {}


@pytest.mark.parametrize(
    "command", ["", "demo", "pretrain", "evaluate linear", "shards build", "shards inspect", "monitor"]
)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*command.split(), "--help"])
    assert exit_info.value.code == 0
    assert ("example:" in capsys.readouterr().out) == bool(command)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import launch.cli.main; launch.cli.main.parser()", {"torch", "deepspeed", "nvidia", "cv2", "sklearn"}),
        ("import launch.run.config", {"torch._dynamo", "deepspeed", "nvidia", "sklearn"}),
    ],
)
def test_help_and_configuration_import_no_heavy_library(statement: str, heavy: set[str]) -> None:
    code = f"import sys; {statement}; sys.exit(str({heavy} & set(sys.modules) or ''))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == ""
