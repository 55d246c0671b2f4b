"""Evaluations: `mcl evaluate PROTOCOL`, here or, over several ranks, in this file started once a rank."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

from launch.local_ranks import Meeting, as_rank, launch_ranks, this_birth, watched_rank
from launch.subject import RANDOM, load_pretrain_config, load_subject, settled
from mcl_dist.errors import EXIT_FAILURE, EXIT_USAGE, ConfigError, UserError

if TYPE_CHECKING:
    from launch.evaluate_settings import FrozenConfig, SupervisedEvaluation
    from launch.subject import Subject
    from mcl_dist.distributed.process_group import Ranks
    from mcl_dist.evaluation.metrics import Scores

PROTOCOLS = {
    "svm": "linear SVM on the mean features of evenly spaced clips",
    "retrieval": "nearest training videos by the cosine of mean features",
    "knn": "votes of the nearest training videos",
    "linear": "linear layer trained on features of random clips",
    "finetune": "all of the encoder trained with a linear layer; from scratch with --checkpoint random",
}
SUPERVISED = ("linear", "finetune")  # those that train for long: a run each, with a folder
# Options that stand for a key of the configuration.
SHORTHANDS = {
    "clips": "clips.count",
    "cost": "svm.cost",
    "cache": "data.cache",
    "recalibrate": "recalibrate",
    "run_dir": "run.dir",
}
OF_PRETRAIN = "pretrain."
LABELS = {"top1": "top-1", "top5": "top-5", "mean_class": "mean of classes"}
PROBE_SECONDS = 86400.0  # that ranks wait for the first to fit its probe; one that dies ends them all at once
MOST_LINES = 40  # of the table of classes on a terminal
EXAMPLE = """example:
  mcl evaluate svm --checkpoint runs/ucf101 --train /data/ucf101/train --test /data/ucf101/test
  mcl evaluate knn --checkpoint runs/ucf101 --train … --test … --ranks 4 knn.neighbours=10
  mcl evaluate svm --checkpoint runs/ucf101 --train s1/train --test s1/test --train s2/train --test s2/test
  mcl evaluate svm --checkpoint random --pretrain configs/pretrain/ucf101.yaml --train … --test … pretrain.run.seed=1
  mcl evaluate linear --checkpoint runs/k400 --train … --test … --ranks 4 --run-dir runs/k400-linear
  mcl evaluate finetune --checkpoint runs/k400 --train … --test … --ranks 4 --run-dir runs/k400-finetune
"""


@dataclass(frozen=True)
class Job:
    """What a command line asks for; ranks get it as JSON.

    Attributes:
        protocol: of `PROTOCOLS`.
        checkpoint: as for `load_subject`.
        evaluated: what it stood for when the command began; empty: whatever it stands for.
        train, test: URLs of the splits' sets.
        config, overrides: of the evaluation.
        pretrain, pretrain_overrides: the pre-training whose start `random` is, and changes of it.
        as_json: print for machines.
    """

    protocol: str
    checkpoint: str
    train: Sequence[str]
    test: Sequence[str]
    config: str | None = None
    overrides: Sequence[str] = ()
    pretrain: str | None = None
    pretrain_overrides: Sequence[str] = ()
    as_json: bool = False
    evaluated: str = ""

    def frozen(self) -> FrozenConfig:
        """The checked configuration of a protocol on frozen features; errors as of `load_config`."""
        from launch.evaluate_settings import KnnEvaluation, RetrievalEvaluation, SvmEvaluation
        from mcl_dist.config import load_config

        schemas: dict[str, type[FrozenConfig]] = {
            "svm": SvmEvaluation,
            "knn": KnnEvaluation,
            "retrieval": RetrievalEvaluation,
        }
        return load_config(schemas[self.protocol], self.config, self.overrides)

    def supervised(self, num_ranks: int) -> SupervisedEvaluation:
        """… of one that trains, on so many ranks."""
        from launch.evaluate_settings import FinetuneEvaluation, LinearEvaluation
        from mcl_dist.config import load_config

        schemas: dict[str, type[SupervisedEvaluation]] = {"linear": LinearEvaluation, "finetune": FinetuneEvaluation}
        config = load_config(schemas[self.protocol], self.config, self.overrides)
        config.check(num_ranks)
        return config

    def subject(self) -> Subject:
        """What is evaluated; errors as of `load_subject`."""
        if self.pretrain is None:
            return load_subject(self.evaluated or self.checkpoint)
        return load_subject(self.checkpoint, load_pretrain_config(self.pretrain, self.pretrain_overrides))


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `mcl evaluate`."""
    parser = commands.add_parser("evaluate", help="score an encoder by a protocol")
    protocols = parser.add_subparsers(title="protocols", metavar="PROTOCOL", required=True)
    for name, what in PROTOCOLS.items():
        each = protocols.add_parser(
            name, help=what, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        _add_arguments(each)
        if name != "finetune":  # which measures them in training
            each.add_argument(
                "--recalibrate",
                action=argparse.BooleanOptionalAction,
                help="measure BatchNorm's statistics anew on training clips (default: for `random` only)",
            )
        if name == "svm":
            each.add_argument("--cost", type=positive_number, help="C of the SVM (default: 1)")
        if name in SUPERVISED:
            each.add_argument(
                "--run-dir",
                metavar="DIR",
                help="run folder: log, metrics, checkpoints; with one that is there the run goes on (sets run.dir)",
            )
        each.set_defaults(run=run, protocol=name)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate as the command line says, print the scores; returns the exit code."""
    job = _job(arguments)
    if job.protocol in SUPERVISED:
        return _supervise(job, arguments.ranks)
    job.frozen()  # what is wrong with it is told before ranks are started
    job = replace(job, evaluated=settled(job.checkpoint))
    if arguments.ranks > 1:
        return _by_ranks(job, arguments.ranks)
    import torch

    from mcl_dist.distributed.process_group import Ranks

    evaluate(job, Ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    return 0


def _by_ranks(job: Job, num_ranks: int) -> int:
    """Evaluate over several ranks; returns their exit code.

    Raises:
        UserError: one ended in a way that it could not tell of itself.
    """
    code = launch_ranks(__file__, [json.dumps(asdict(job))], num_ranks)
    if code not in (0, EXIT_FAILURE, EXIT_USAGE):
        raise UserError(f"a rank was ended from outside (exit code {code}), as for want of memory; use fewer --ranks")
    return code


def evaluate(job: Job, ranks: Ranks) -> None:
    """All splits of a job, and on the first rank what comes of them, printed."""
    from launch.frozen import evaluate_frozen

    settings = job.frozen()
    splits = []
    for train, test in zip(job.train, job.test, strict=True):
        scores = evaluate_frozen(job.subject(), train, test, settings, ranks)
        if scores is not None:
            splits.append(scores)
    if ranks.is_first:
        _tell(job, splits, settings)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """One rank, started by the DeepSpeed launcher."""
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="One rank of an evaluation.")
    parser.add_argument("job", help="JSON")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_args(words)
    job = Job(**json.loads(arguments.job))
    as_rank(_supervised_work(job) if job.protocol in SUPERVISED else lambda: _evaluate_as_rank(job))


def _evaluate_as_rank(job: Job) -> None:
    from launch.orphans import stop_with_launcher
    from mcl_dist.distributed.process_group import Ranks, limit_waiting
    from mcl_dist.distributed.shutdown import StopRequest
    from mcl_dist.training.deepspeed_engine import join_process_group, pick_device

    stop_with_launcher(StopRequest(), seconds=0)
    device = pick_device()
    join_process_group(device)
    limit_waiting(PROBE_SECONDS)
    ranks = Ranks(device)
    evaluate(job, ranks)
    ranks.barrier()


def _supervise(job: Job, num_ranks: int) -> int:
    """Supervise the ranks of a protocol that trains; returns the exit code."""
    from launch.supervise import Supervisor

    config = job.supervised(num_ranks)
    if job.pretrain is not None:
        load_pretrain_config(job.pretrain, job.pretrain_overrides)  # its mistakes, too, are told before ranks start
    job = replace(job, evaluated=settled(job.checkpoint))
    with TemporaryDirectory(prefix="mcl-") as runtime:
        end = Supervisor(
            script=__file__,
            words=[json.dumps(asdict(job))],
            meeting=Meeting(num_ranks),
            limits=config.supervise,
            runtime=Path(runtime),
            log=Path(config.run.dir) / "log.jsonl",
        ).run()
    return end.exit_code


def _supervised_work(job: Job) -> Callable[[], bool]:
    """One rank's part in a protocol that trains, all splits; False where it was asked to stop."""
    stop, heartbeat = watched_rank()

    def work() -> bool:
        birth = this_birth()
        from launch.orphans import stop_with_launcher
        from launch.supervised import Rank, evaluate_supervised
        from mcl_dist.distributed.process_group import Ranks
        from mcl_dist.training.deepspeed_engine import join_process_group, pick_device

        stop_with_launcher(stop)
        device = pick_device()
        join_process_group(device)
        ranks = Ranks(device)
        config = job.supervised(ranks.count)
        splits = []
        for number, (train, test) in enumerate(zip(job.train, job.test, strict=True), start=1):
            of_split = config if len(job.train) == 1 else config.below(f"split-{number}")
            outcome = evaluate_supervised(job.subject(), train, test, of_split, Rank(ranks, stop, heartbeat, birth))
            if not outcome.is_done:
                return False
            splits += [outcome.scores] if outcome.scores else []
        if ranks.is_first:
            tell_once(job, splits, config)
        return True

    return work


def tell_once(job: Job, splits: Sequence[Scores], settings: SupervisedEvaluation) -> None:
    """Print the scores of a supervised run, which is not to start again where nobody reads them (`mcl … | head`).

    Raises:
        UserError: nobody does.
    """
    try:
        _tell(job, splits, settings)
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise UserError(
            "whoever read the scores went away; the same command goes on from the last step and prints them again"
        ) from error


def _tell(job: Job, splits: Sequence[Scores], settings: FrozenConfig | SupervisedEvaluation) -> None:
    """Print what was found, and keep it for the report of the run that it is of."""
    from launch.kept_evaluations import keep

    report = _report(job, splits)
    print(json.dumps(report) if job.as_json else _text(splits))
    if line := keep(job.checkpoint, job.evaluated, report, splits, settings):
        print(line, file=sys.stderr)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        help=f"run folder, or one step-… folder of it; `{RANDOM}` for the untrained start of --pretrain",
    )
    parser.add_argument(
        "--train", required=True, metavar="URL", action="append", help="set to learn from; once for each split"
    )
    parser.add_argument(
        "--test", required=True, metavar="URL", action="append", help="set to be tested on; once for each split"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, for example configs/evaluate/svm.yaml")
    parser.add_argument(
        "--pretrain",
        metavar="FILE",
        help="pre-training configuration whose start `random` is; without it, --config and key=value are of that one",
    )
    parser.add_argument("--ranks", type=whole_number, default=1, help="processes on this machine (default: 1)")
    parser.add_argument("--clips", type=whole_number, help="clips of a video (default: 20)")
    parser.add_argument("--cache", metavar="DIR", help="local folder for shards of sets that are elsewhere")
    parser.add_argument("--json", action="store_true", help="print scores, intervals, classes, confusion as JSON")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override the file, e.g. clips.frames=32; with `pretrain.` before the key, that of --pretrain",
    )


def _job(arguments: argparse.Namespace) -> Job:
    if len(arguments.train) != len(arguments.test):
        raise ConfigError(
            f"--train is given {len(arguments.train)} times and --test {len(arguments.test)}; give both once a split"
        )
    overrides = [word for word in arguments.overrides if not word.startswith(OF_PRETRAIN)]
    of_pretrain = [word.removeprefix(OF_PRETRAIN) for word in arguments.overrides if word.startswith(OF_PRETRAIN)]
    config, pretrain = arguments.config, arguments.pretrain
    if arguments.checkpoint == RANDOM and pretrain is None:
        config, pretrain, overrides, of_pretrain = None, config, [], [*overrides, *of_pretrain]
    elif arguments.checkpoint != RANDOM and pretrain is not None:
        raise ConfigError(
            f"--pretrain: says what `{RANDOM}` is, and --checkpoint is {arguments.checkpoint}; leave one out"
        )
    elif of_pretrain and pretrain is None:
        raise ConfigError(f"`{OF_PRETRAIN}{of_pretrain[0]}` overrides --pretrain, but none is named")
    return Job(
        protocol=arguments.protocol,
        checkpoint=arguments.checkpoint,
        train=arguments.train,
        test=arguments.test,
        config=config,
        overrides=[*overrides, *_shorthands(arguments)],
        pretrain=pretrain,
        pretrain_overrides=of_pretrain,
        as_json=arguments.json,
    )


def _shorthands(arguments: argparse.Namespace) -> list[str]:
    """Options as overrides."""
    given = {key: getattr(arguments, option, None) for option, key in SHORTHANDS.items()}
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]


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


def whole_number(text: str) -> int:
    """Argument type: at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def positive_number(text: str) -> float:
    """Argument type: above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


if __name__ == "__main__":
    main()
