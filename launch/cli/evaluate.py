"""`mcl evaluate PROTOCOL`: score an encoder."""

import argparse
import json

from launch.cli.command import Commands, add_command
from launch.evaluation.encoder_under_test import RANDOM
from launch.evaluation.job import TRAINING_PROTOCOLS, Job
from launch.evaluation.launch_job import run_job
from mcl_dist.errors import ConfigError

PROTOCOLS = {
    "svm": "linear SVM on the mean features of evenly spaced clips",
    "retrieval": "nearest training videos by the cosine of mean features",
    "knn": "votes of the nearest training videos",
    "linear": "linear layer trained on features of random clips",
    "finetune": "whole encoder trained with a linear layer; from scratch with --checkpoint random",
}
# Options that set a key of the configuration.
SHORTHANDS = {
    "clips": "clips.count",
    "cost": "svm.cost",
    "cache": "data.cache",
    "recalibrate": "recalibrate",
    "run_dir": "run.dir",
}
PRETRAIN_PREFIX = "pretrain."
EXAMPLE = """example:
  mcl evaluate svm --checkpoint runs/ucf101 --train /data/ucf101/train --test /data/ucf101/test
  mcl evaluate knn --checkpoint runs/ucf101 --train … --test … --ranks 4 knn.neighbours=10
  mcl evaluate svm --checkpoint runs/ucf101 --train s1/train --test s1/test --train s2/train --test s2/test
  mcl evaluate svm --checkpoint random --pretrain configs/pretrain/ucf101.yaml --train … --test … pretrain.run.seed=1
  mcl evaluate linear --checkpoint runs/k400 --train … --test … --ranks 4 --run-dir runs/k400-linear
  mcl evaluate finetune --checkpoint runs/k400 --train … --test … --ranks 4 --run-dir runs/k400-finetune
"""


def register(commands: Commands) -> None:
    """Add `mcl evaluate`."""
    parser = commands.add_parser("evaluate", help="score an encoder by a protocol")
    protocols = parser.add_subparsers(title="protocols", metavar="PROTOCOL", required=True)
    for name, text in PROTOCOLS.items():
        protocol = add_command(protocols, name, run, help=text, example=EXAMPLE)
        _add_input_arguments(protocol)
        _add_option_arguments(protocol)
        _add_protocol_arguments(protocol, name)
        protocol.set_defaults(protocol=name)


def run(arguments: argparse.Namespace) -> int:
    """Run the evaluation, which prints the scores; return the exit code."""
    return run_job(_job(arguments), arguments.ranks)


def _add_input_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        help=f"run folder, or one step-… folder of it; `{RANDOM}` for the untrained start of --pretrain",
    )
    parser.add_argument("--train", required=True, metavar="URL", action="append", help="training set, once per split")
    parser.add_argument("--test", required=True, metavar="URL", action="append", help="test set, once per split")
    parser.add_argument("--config", metavar="FILE", help="YAML file, for example configs/evaluate/svm.yaml")
    parser.add_argument(
        "--pretrain",
        metavar="FILE",
        help=f"pre-training configuration of `{RANDOM}`; without it, --config and key=value are the pre-training's",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"override the file, e.g. clips.frames=32; {PRETRAIN_PREFIX}key=value overrides --pretrain",
    )


def _add_option_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=whole_number, default=1, help="processes on this machine (default: 1)")
    parser.add_argument("--clips", type=whole_number, help="clips per video (default: 20)")
    parser.add_argument("--cache", metavar="DIR", help="local folder that caches the shards of remote sets")
    parser.add_argument("--json", action="store_true", help="print scores, intervals, classes, confusion as JSON")


def _add_protocol_arguments(parser: argparse.ArgumentParser, protocol: str) -> None:
    if protocol != "finetune":  # fine-tuning measures the statistics itself
        parser.add_argument(
            "--recalibrate",
            action=argparse.BooleanOptionalAction,
            help=f"measure BatchNorm's statistics on training clips (default: only for `{RANDOM}`)",
        )
    if protocol == "svm":
        parser.add_argument("--cost", type=positive_number, help="C of the SVM (default: 1)")
    if protocol in TRAINING_PROTOCOLS:
        parser.add_argument(
            "--run-dir",
            metavar="DIR",
            help="run folder: log, metrics, checkpoints; an existing run resumes (sets run.dir)",
        )


def _job(arguments: argparse.Namespace) -> Job:
    num_train, num_test = len(arguments.train), len(arguments.test)
    if num_train != num_test:
        raise ConfigError(f"--train, --test: found {num_train} and {num_test}; give both once per split")
    config, pretrain, overrides, pretrain_overrides = _configs(arguments)
    return Job(
        protocol=arguments.protocol,
        checkpoint=arguments.checkpoint,
        train=arguments.train,
        test=arguments.test,
        config=config,
        overrides=[*overrides, *_shorthands(arguments)],
        pretrain=pretrain,
        pretrain_overrides=pretrain_overrides,
        as_json=arguments.json,
    )


def _configs(arguments: argparse.Namespace) -> tuple[str | None, str | None, list[str], list[str]]:
    """Files and overrides of the evaluation and of the pre-training: (config, pretrain, overrides, its overrides)."""
    config, pretrain = arguments.config, arguments.pretrain
    overrides = [text for text in arguments.overrides if not text.startswith(PRETRAIN_PREFIX)]
    of_pretrain = [text for text in arguments.overrides if text.startswith(PRETRAIN_PREFIX)]
    pretrain_overrides = [text.removeprefix(PRETRAIN_PREFIX) for text in of_pretrain]
    if arguments.checkpoint == RANDOM and pretrain is None:
        return None, config, [], [*overrides, *pretrain_overrides]
    if arguments.checkpoint != RANDOM and pretrain is not None:
        raise ConfigError(
            f"--pretrain: configures --checkpoint {RANDOM}, found --checkpoint {arguments.checkpoint}; remove one"
        )
    if of_pretrain and pretrain is None:
        raise ConfigError(f"{of_pretrain[0]}: overrides --pretrain, which is missing; add it, or remove the prefix")
    return config, pretrain, overrides, pretrain_overrides


def _shorthands(arguments: argparse.Namespace) -> list[str]:
    """Options as overrides."""
    values = {key: getattr(arguments, option, None) for option, key in SHORTHANDS.items()}
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


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
