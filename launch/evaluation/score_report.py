"""Scores of an evaluation: printed as text or JSON, and logged in the run folder."""

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
MAX_CLASSES = 40  # in the table of a terminal


def print_scores_once(job: Job, splits: Sequence[Scores], config: TrainingEvaluation) -> None:
    """Print the scores of a training protocol; a closed pipe (`mcl … | head`) is a UserError, which is not retried."""
    try:
        print_scores(job, splits, config)
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise UserError(
            "standard output: closed before the scores were read; run the same command again, which resumes after the "
            "last step and prints them"
        ) from error


def print_scores(job: Job, splits: Sequence[Scores], config: FrozenConfig | TrainingEvaluation) -> None:
    """Print the scores, and log them for the run's report."""
    from launch.evaluation.results_log import log_results

    report = _report(job, splits)
    print(json.dumps(report) if job.as_json else _text(splits))
    if message := log_results(job.checkpoint, job.evaluated, report, splits, config):
        print(message, file=sys.stderr)


def _report(job: Job, splits: Sequence[Scores]) -> dict[str, Any]:
    """The JSON output: means over splits, then every split."""
    from mcl_dist.evaluation.metrics import mean_of_splits

    named = zip(job.train, job.test, splits, strict=True)
    parts = [{"train": train, "test": test, **split.to_json()} for train, test, split in named]
    return {"protocol": job.protocol, "checkpoint": job.checkpoint, **mean_of_splits(splits), "splits": parts}


def _text(splits: Sequence[Scores]) -> str:
    """The text output: a line for each split with 95 % intervals, then their mean, or the classes of a single split."""
    from mcl_dist.evaluation.metrics import mean_of_splits

    lines = [_line(mean_of_splits([split])) for split in splits]
    if len(splits) > 1:
        return "\n".join([*lines, f"mean of {len(splits)} splits: {_line(mean_of_splits(splits))}"])
    known = (each for each in splits[0].classes if each.accuracy is not None)
    worst_first = sorted(known, key=lambda each: each.accuracy or 0.0)
    lines += [f"  {each.accuracy:7.1%} of {each.videos:5} {each.name}" for each in worst_first[:MAX_CLASSES]]
    if len(worst_first) > MAX_CLASSES:
        lines.append(f"  … and {len(worst_first) - MAX_CLASSES} classes with higher accuracy; --json lists all")
    return "\n".join(lines)


def _line(means: dict[str, Any]) -> str:
    parts = []
    for name, value in means.items():
        if name in means["intervals"]:
            low, high = means["intervals"][name]
            parts.append(f"{LABELS.get(name, name)} {value:.2%} ({low:.1%} to {high:.1%})")
    return "  ".join([*parts, f"{means['videos']} test videos"])
