"""Scores of an evaluation: printed for people or as JSON, and kept in the folder of the run that they are of."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.evaluation.job import Job
from mcl_dist.errors import UserError

if TYPE_CHECKING:
    from launch.evaluation.config import FrozenConfig, TrainingEvaluation
    from mcl_dist.evaluation.metrics import Scores

LABELS = {"top1": "top-1", "top5": "top-5", "mean_class": "mean of classes"}
MOST_LINES = 40  # of the table of classes on a terminal


def tell_once(job: Job, splits: Sequence[Scores], settings: TrainingEvaluation) -> None:
    """Print the scores of a supervised run, which is not to start again where nobody reads them (`mcl … | head`).

    Raises:
        UserError: nobody does.
    """
    try:
        tell(job, splits, settings)
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise UserError(
            "whoever read the scores went away; the same command goes on from the last step and prints them again"
        ) from error


def tell(job: Job, splits: Sequence[Scores], settings: FrozenConfig | TrainingEvaluation) -> None:
    """Print what was found, and keep it for the report of the run that it is of."""
    from launch.evaluation.results_log import keep

    report = _report(job, splits)
    print(json.dumps(report) if job.as_json else _text(splits))
    if line := keep(job.checkpoint, job.evaluated, report, splits, settings):
        print(line, file=sys.stderr)


def _report(job: Job, splits: Sequence[Scores]) -> dict[str, Any]:
    """For machines: means over splits, then every split."""
    from mcl_dist.evaluation.metrics import mean_of_splits

    return {
        "protocol": job.protocol,
        "checkpoint": job.checkpoint,
        **mean_of_splits(splits),
        "splits": [
            {"train": train, "test": test, **split.to_json()}
            for train, test, split in zip(job.train, job.test, splits, strict=True)
        ],
    }


def _text(splits: Sequence[Scores]) -> str:
    """For people: a line a split and one of their mean, with 95 % intervals; of a single split its classes, too."""
    from mcl_dist.evaluation.metrics import mean_of_splits

    means = [mean_of_splits([split]) for split in splits]
    lines = [_line(mean) for mean in means]
    if len(splits) > 1:
        return "\n".join([*lines, f"mean of {len(splits)} splits: {_line(mean_of_splits(splits))}"])
    worst_first = sorted(
        (each for each in splits[0].classes if each.accuracy is not None), key=lambda each: each.accuracy or 0.0
    )
    lines += [f"  {each.accuracy:7.1%} of {each.videos:5} {each.name}" for each in worst_first[:MOST_LINES]]
    if len(worst_first) > MOST_LINES:
        lines.append(f"  … and {len(worst_first) - MOST_LINES} classes above these; --json has them all")
    return "\n".join(lines)


def _line(means: dict[str, Any]) -> str:
    parts = []
    for name, value in means.items():
        if name in means["intervals"]:
            low, high = means["intervals"][name]
            parts.append(f"{LABELS.get(name, name)} {value:.2%} ({low:.1%} to {high:.1%})")
    return "  ".join([*parts, f"{means['videos']} test videos"])
