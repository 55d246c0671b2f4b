"""`mcl evaluate PROTOCOL`: in this process or, over several ranks, under the DeepSpeed launcher."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from launch.evaluation.encoder_under_test import RANDOM, load_pretrain_config, settled
from launch.evaluation.job import SUPERVISED, Job
from launch.evaluation.rank import evaluate
from launch.supervision.deepspeed_launcher import NodeSpec, launch_ranks
from mcl_dist.errors import EXIT_FAILURE, EXIT_USAGE, ConfigError, UserError

if TYPE_CHECKING:
    pass

PROTOCOLS = {
    "svm": "linear SVM on the mean features of evenly spaced clips",
    "retrieval": "nearest training videos by the cosine of mean features",
    "knn": "votes of the nearest training videos",
    "linear": "linear layer trained on features of random clips",
    "finetune": "all of the encoder trained with a linear layer; from scratch with --checkpoint random",
}
# Options that stand for a key of the configuration.
SHORTHANDS = {
    "clips": "clips.count",
    "cost": "svm.cost",
    "cache": "data.cache",
    "recalibrate": "recalibrate",
    "run_dir": "run.dir",
}
SCRIPT = Path(__file__).parents[1] / "evaluate.py"  # of one rank
OF_PRETRAIN = "pretrain."
EXAMPLE = """example:
  mcl evaluate svm --checkpoint runs/ucf101 --train /data/ucf101/train --test /data/ucf101/test
  mcl evaluate knn --checkpoint runs/ucf101 --train … --test … --ranks 4 knn.neighbours=10
  mcl evaluate svm --checkpoint runs/ucf101 --train s1/train --test s1/test --train s2/train --test s2/test
  mcl evaluate svm --checkpoint random --pretrain configs/pretrain/ucf101.yaml --train … --test … pretrain.run.seed=1
  mcl evaluate linear --checkpoint runs/k400 --train … --test … --ranks 4 --run-dir runs/k400-linear
  mcl evaluate finetune --checkpoint runs/k400 --train … --test … --ranks 4 --run-dir runs/k400-finetune
"""


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

    from mcl_dist.distributed.process_group import ProcessGroup

    evaluate(job, ProcessGroup(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    return 0


def _by_ranks(job: Job, num_ranks: int) -> int:
    """Evaluate over several ranks; returns their exit code.

    Raises:
        UserError: one ended in a way that it could not tell of itself.
    """
    code = launch_ranks(str(SCRIPT), [json.dumps(asdict(job))], num_ranks)
    if code not in (0, EXIT_FAILURE, EXIT_USAGE):
        raise UserError(f"a rank was ended from outside (exit code {code}), as for want of memory; use fewer --ranks")
    return code


def _supervise(job: Job, num_ranks: int) -> int:
    """Supervise the ranks of a protocol that trains; returns the exit code."""
    from launch.supervision.supervisor import Supervisor

    config = job.supervised(num_ranks)
    if job.pretrain is not None:
        load_pretrain_config(job.pretrain, job.pretrain_overrides)  # its mistakes, too, are told before ranks start
    job = replace(job, evaluated=settled(job.checkpoint))
    with TemporaryDirectory(prefix="mcl-") as runtime:
        end = Supervisor(
            script=str(SCRIPT),
            words=[json.dumps(asdict(job))],
            meeting=NodeSpec(num_ranks),
            limits=config.supervise,
            runtime=Path(runtime),
            log=Path(config.run.dir) / "log.jsonl",
        ).run()
    return end.exit_code


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
