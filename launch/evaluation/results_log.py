"""What evaluations of a run found, kept in its folder: a line of `evaluations.jsonl` each."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcl_dist.checkpoint.format import STEP_FOLDER, step_of
from mcl_dist.config import RUN_CONFIG
from mcl_dist.errors import UserError

if TYPE_CHECKING:
    from launch.evaluation.config import FrozenConfig, TrainingEvaluation
    from mcl_dist.evaluation.metrics import Scores

FILE = "evaluations.jsonl"
ON_THE_WAY = "on the way"  # protocol of those that pre-training asks for itself
HOW = (
    "data",
    "features",
    "bootstrap",
    "run",
    "checkpoint",
    "supervise",
)  # settings that say how, not what was evaluated


def keep(
    checkpoint: str,
    evaluated: str,
    report: Mapping[str, Any],
    splits: Sequence[Scores],
    settings: FrozenConfig | TrainingEvaluation,
) -> str:
    """Add an evaluation of a run or of one of its checkpoints; returns why it could not be kept, where it could not.

    Of anything else, a file or an untrained encoder, nothing is kept.

    Args:
        checkpoint: as for `mcl_dist.load_encoder`.
        evaluated: the `step-…` folder that it stood for.
        report: what was printed, or would have been with `--json`.
        splits: which it is of.
        settings: of the evaluation.
    """
    folder = run_folder(checkpoint)
    if folder is None:
        return ""
    what = {name: value for name, value in asdict(settings).items() if name not in HOW}
    neighbours = [[each._asdict() for each in split.neighbours] for split in splits]
    try:
        add(folder, {**report, "step": step_of(evaluated), "settings": what, "neighbours": neighbours})
    except UserError as error:
        return f"not kept for the run's report ({error})"
    return ""


def add(folder: Path, fields: Mapping[str, Any]) -> None:
    """Add a line, with the time.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with (folder / FILE).open("a") as file:
            file.write(json.dumps({"time": time.time(), **fields}) + "\n")
    except OSError as error:
        raise UserError(f"{folder / FILE}: {error.strerror or error}") from error


def kept(folder: Path) -> list[dict[str, Any]]:
    """All evaluations of a run, oldest first; lines that are none are left out."""
    try:
        lines = (folder / FILE).read_text().splitlines()
    except OSError:
        return []
    return [line for line in map(_parsed, lines) if line is not None]


def run_folder(checkpoint: str) -> Path | None:
    """The run folder that a checkpoint is or lies in, on this machine; none for anything else."""
    path = Path(checkpoint)
    folder = path.parent.parent if STEP_FOLDER.fullmatch(path.name) else path
    return folder if (folder / RUN_CONFIG).is_file() else None


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and {"time", "protocol"} <= fields.keys() else None
