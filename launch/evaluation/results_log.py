"""The log of a run's evaluations: `evaluations.jsonl` in the run folder, one line per evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcl_dist.checkpoint.format import STEP_FOLDER, step_of
from mcl_dist.config import RUN_CONFIG
from mcl_dist.errors import UserError
from mcl_dist.storage import jsonl

if TYPE_CHECKING:
    from launch.evaluation.config import FrozenConfig, TrainingEvaluation
    from mcl_dist.evaluation.metrics import Scores

FILE = "evaluations.jsonl"
ONLINE = "on the way"  # the `protocol` of evaluations during pre-training
EXECUTION_SECTIONS = ("data", "features", "bootstrap", "run", "checkpoint", "supervise")  # do not define the protocol


def log_results(
    checkpoint: str,
    evaluated: str,
    report: Mapping[str, Any],
    splits: Sequence[Scores],
    config: FrozenConfig | TrainingEvaluation,
) -> str:
    """Log an evaluation of a run or of one of its checkpoints; return an error message if that fails, else "".

    Evaluations of a weights file or of an untrained encoder are not logged. `evaluated` is the `step-…` URL that
    `checkpoint` stood for, `report` the output of `--json`.
    """
    folder = run_folder(checkpoint)
    if folder is None:
        return ""
    settings = {name: value for name, value in asdict(config).items() if name not in EXECUTION_SECTIONS}
    neighbours = [[each._asdict() for each in split.neighbours] for split in splits]
    try:
        append_result(folder, {**report, "step": step_of(evaluated), "settings": settings, "neighbours": neighbours})
    except UserError as error:
        return f"the run's report will lack this evaluation: {error}"
    return ""


def append_result(folder: Path, fields: Mapping[str, Any]) -> None:
    """Append a line with the time (Unix seconds) and the fields; raises UserError if it cannot be written."""
    try:
        jsonl.append(folder / FILE, {"time": time.time(), **fields})
    except OSError as error:
        raise UserError(f"{folder / FILE}: {error.strerror or error}") from error


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All evaluations of a run, oldest first; unreadable lines are left out."""
    try:
        records = jsonl.read(folder / FILE)
    except OSError:
        return []
    return [record for record in records if {"time", "protocol"} <= record.keys()]


def run_folder(checkpoint: str) -> Path | None:
    """The local run folder that a checkpoint is or lies in; None for anything else."""
    path = Path(checkpoint)
    folder = path.parent.parent if STEP_FOLDER.fullmatch(path.name) else path
    return folder if (folder / RUN_CONFIG).is_file() else None
