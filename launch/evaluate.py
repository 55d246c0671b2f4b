"""Probes of frozen encoders: `mcl evaluate svm`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mcl_dist.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch

    from dataloading.clips import ClipGeometry, ProbeClips
    from dataloading.stream import ShardSet
    from launch.settings import PretrainConfig
    from mcl_dist.encoder import Encoder
    from mcl_dist.evaluation.svm import Accuracy

RANDOM = "random"
RECALIBRATION_BATCHES = 20
RECALIBRATION_VIDEOS = 32  # a batch: as many as small pre-training runs use
EXAMPLE = """example:
  mcl evaluate svm --checkpoint runs/ucf101 --train /data/ucf101/train --test /data/ucf101/test
  mcl evaluate svm --checkpoint random --config configs/pretrain/ucf101.yaml --train … --test … run.seed=1
"""


@dataclass(frozen=True)
class Subject:
    """What is evaluated: an encoder and the shape of the clips that it is shown."""

    encoder: Encoder
    geometry: ClipGeometry


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `mcl evaluate`."""
    parser = commands.add_parser("evaluate", help="score an encoder with a probe")
    protocols = parser.add_subparsers(title="protocols", metavar="PROTOCOL", required=True)
    svm = protocols.add_parser(
        "svm",
        help="linear SVM on the mean features of evenly spaced clips",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    svm.add_argument(
        "--checkpoint",
        required=True,
        help=f"run folder, or one step-… folder of it; `{RANDOM}` for the untrained start of --config",
    )
    svm.add_argument("--train", required=True, metavar="URL", help="shard set that the SVM learns from")
    svm.add_argument("--test", required=True, metavar="URL", help="shard set that it is tested on")
    svm.add_argument(
        "--config",
        metavar="FILE",
        help="pre-training configuration to take clips and encoder from (default: the run's)",
    )
    svm.add_argument("--clips", type=whole_number, default=20, help="clips of a video (default: %(default)s)")
    svm.add_argument("--cost", type=positive_number, default=1.0, help="C of the SVM (default: %(default)s)")
    svm.add_argument(
        "--recalibrate",
        action=argparse.BooleanOptionalAction,
        help="measure BatchNorm's statistics anew on training clips (default: for `random` only)",
    )
    svm.add_argument("--cache", metavar="DIR", help="local folder for shards of sets that are elsewhere")
    svm.add_argument("--json", action="store_true", help="print top1, top5 (fractions) and videos as JSON")
    svm.add_argument("overrides", nargs="*", metavar="key=value", help="override --config, e.g. data.frames=32")
    svm.set_defaults(run=run_svm)


def run_svm(arguments: argparse.Namespace) -> int:
    """Evaluate as the command line says, print the score; returns 0."""
    subject = load_subject(arguments.checkpoint, arguments.config, arguments.overrides)
    untrained = arguments.checkpoint == RANDOM
    result = evaluate_svm(
        subject,
        arguments.train,
        arguments.test,
        cache=arguments.cache,
        num_clips=arguments.clips,
        cost=arguments.cost,
        recalibrated=untrained if arguments.recalibrate is None else arguments.recalibrate,
    )
    if arguments.json:
        print(json.dumps(asdict(result)))
    else:
        print(f"top-1 {result.top1:.2%}  top-5 {result.top5:.2%}  {result.videos} test videos")
    return 0


def load_subject(checkpoint: str, config_file: str | None, overrides: Sequence[str] = ()) -> Subject:
    """The encoder of a checkpoint, or an untrained one, with the clips it was made for.

    Raises:
        ConfigError: `random` without a configuration, or overrides of none.
        UserError: no such checkpoint, or one of another architecture than the configuration's.
    """
    from launch.settings import PretrainConfig
    from mcl_dist.config import build_config, load_config

    if config_file is None:
        if checkpoint == RANDOM:
            raise ConfigError("--checkpoint random: say which encoder with --config FILE")
        if overrides:
            raise ConfigError(f"`{overrides[0]}` overrides a configuration, but none is named; add --config FILE")
        encoder, stored = _load_checkpoint(checkpoint)
        return Subject(encoder, _geometry(build_config(PretrainConfig, stored)))
    # Sets and run folder are no matter of the encoder: a configuration may leave them to the command line.
    needless = ("data.train=", "run.dir=")
    config = load_config(PretrainConfig, config_file, [*(f"{key}''" for key in needless), *overrides])
    if checkpoint == RANDOM:
        return Subject(_untrained(config), _geometry(config))
    encoder, _ = _load_checkpoint(checkpoint)
    if encoder.config != config.encoder:
        raise UserError(
            f"{checkpoint}: holds another architecture ({encoder.config} there, {config.encoder} in {config_file}); "
            "leave --config out, or name the run's own"
        )
    return Subject(encoder, _geometry(config))


def evaluate_svm(
    subject: Subject,
    train_url: str,
    test_url: str,
    *,
    cache: str | None = None,
    num_clips: int = 20,
    cost: float = 1.0,
    recalibrated: bool = False,
) -> Accuracy:
    """Features of both sets, an SVM on the one, its accuracy on the other (METHOD.md, section 6).

    Raises:
        UserError: a set cannot be read, is empty, or has other classes than the other.
    """
    from dataloading.stream import ShardSet
    from mcl_dist.evaluation.features import extract_features, recalibrate
    from mcl_dist.evaluation.svm import svm_accuracy

    train, test = (ShardSet(url, cache) for url in (train_url, test_url))
    check_classes(train_url, train.manifest.classes, test_url, test.manifest.classes)
    encoder = subject.encoder.to(_device())
    if recalibrated:
        recalibrate(encoder, _recalibration_clips(train, subject.geometry))
    train_features, test_features = (
        extract_features(encoder, _clips(shard_set, subject.geometry, num_clips, what))
        for shard_set, what in ((train, "training features"), (test, "test features"))
    )
    return svm_accuracy(train_features, test_features, cost=cost)


def check_classes(train_url: str, train: Sequence[str], test_url: str, test: Sequence[str]) -> None:
    """Labels count a set's own classes: two sets can only be compared when they have the same.

    Raises:
        UserError: naming a class that one of them lacks.
    """
    if list(train) == list(test):
        return
    alone = sorted(set(train) ^ set(test))
    example = f"`{alone[0]}` is in one alone" if alone else "in another order"
    raise UserError(
        f"{test_url}: its {len(test)} classes are not the {len(train)} of {train_url} ({example}); "
        "build both from folders with the same class names"
    )


def _load_checkpoint(url: str) -> tuple[Encoder, dict[str, Any]]:
    from mcl_dist.checkpoint import load_encoder

    return load_encoder(url)


def _untrained(config: PretrainConfig) -> Encoder:
    """The encoder that a pre-training run of this configuration starts from."""
    import torch

    from mcl_dist.heads import Network
    from mcl_dist.weights import initialise

    torch.manual_seed(config.run.seed)
    network = Network(config.encoder, config.heads)
    initialise(network, config.initial)
    return network.encoder


def _geometry(config: PretrainConfig) -> ClipGeometry:
    from dataloading.clips import ClipGeometry

    return ClipGeometry(config.data.frames, config.data.stride, config.data.crop)


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _clips(
    shard_set: ShardSet, geometry: ClipGeometry, num_clips: int, what: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    from launch.progress import watched

    batches = _probe_clips(shard_set, geometry, num_clips)
    for batch in watched(batches, len(batches), f"{what} of {len(shard_set)} videos"):
        yield batch.clips, batch.labels


def _recalibration_clips(train: ShardSet, geometry: ClipGeometry) -> Iterator[torch.Tensor]:
    """Batches of one clip each of as many videos; a set's order is random, so its first ones are a fair share."""
    from itertools import islice

    batches = _probe_clips(train, geometry, 1, batch_videos=RECALIBRATION_VIDEOS)
    for batch in islice(batches, RECALIBRATION_BATCHES):
        yield batch.clips[:, 0]


def _probe_clips(shard_set: ShardSet, geometry: ClipGeometry, num_clips: int, batch_videos: int = 4) -> ProbeClips:
    from dataloading.clips import ProbeClips
    from launch.build_shards import num_cores

    return ProbeClips(
        shard_set,
        geometry,
        device=_device(),
        num_clips=num_clips,
        batch_videos=batch_videos,
        threads=num_cores(),
    )


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
