"""Protocols that train a classifier: put together as pre-training is, then tested on the mean over a video's clips."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize

from dataloading.loader.config import LabelledConfig
from dataloading.loader.loader import LabelledLoader
from dataloading.loader.probe_clips import ClipBatch, ClipGeometry, ProbeClips
from dataloading.reading.shard_set import ShardSet
from launch.evaluation.config import FinetuneConfig, FinetuneEvaluation, LinearEvaluation, TrainingEvaluation
from launch.evaluation.encoder_under_test import EncoderUnderTest
from launch.evaluation.frozen_protocols import check_split, num_threads, recalibration_clips, told_by
from launch.run.parts import batches_of, build_engine, listening, of_rank, resume, schedule_of, tell_start
from launch.run.run_lock import only_run
from launch.supervision.deepspeed_launcher import heed_stop_file
from launch.terminal.progress import watched
from mcl_dist.checkpoint import CheckpointManager, Progress
from mcl_dist.config import RUN_CONFIG, dump_config
from mcl_dist.distributed.heartbeat import EVALUATING, Heartbeat
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.evaluation.classifier import Classifier, ClassifierLoss, LinearLayer
from mcl_dist.evaluation.classifier_trainer import ClassifierState, ClassifierTrainer
from mcl_dist.evaluation.feature_cache import digest_of
from mcl_dist.evaluation.features import check_finite, gather_features, mean_over_clips, recalibrate, share_of
from mcl_dist.evaluation.metrics import Scores, answers_from_scores, score
from mcl_dist.events import Listener, tell
from mcl_dist.model.encoder import Encoder, normalise
from mcl_dist.run_log.goodput import StartInfo
from mcl_dist.run_log.listeners import Console
from mcl_dist.storage.folder import Folder

# What decides which samples a step holds, what they look like and what learns from them: changed, it is another run.
IMMUTABLE_KEYS = (
    "run.seed", "train.global_batch", "data.lanes", "data.shuffle_window", "clips.frames", "clips.stride", "clips.crop",
    "optimizer.name", "made_of.encoder", "made_of.train_set",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RankContext:
    """This process in a run: its place among the ranks, and what watches it."""

    group: ProcessGroup
    stop: StopRequest
    heartbeat: Heartbeat
    birth: StartInfo


class ClassifierResult(NamedTuple):
    """Whether all was done, or a rank was asked to stop before; on the first rank also the scores."""

    is_done: bool
    scores: Scores | None = None


@dataclasses.dataclass(frozen=True)
class Trainee:
    """What learns in a protocol.

    Attributes:
        network: whose parameters are stepped.
        prepare: clips as bytes (B, T, H, W, 3) to what the network takes.
        encoder: which is in the one or in the other.
        dropout: of its features.
    """

    network: LinearLayer
    prepare: Callable[[torch.Tensor], torch.Tensor]
    encoder: Encoder
    dropout: float


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt, and from what: a training set with its test set, shown in clips of one shape."""

    train_url: str
    train: ShardSet
    test: ShardSet
    geometry: ClipGeometry
    config: TrainingEvaluation

    @property
    def classes(self) -> tuple[str, ...]:
        """Of both sets."""
        return self.train.manifest.classes


def evaluate_supervised(
    subject: EncoderUnderTest, train_url: str, test_url: str, config: TrainingEvaluation, rank: RankContext
) -> ClassifierResult:
    """Train a classifier on the one set, from its newest checkpoint, and test it on the other (METHOD.md, section 6).

    Raises:
        UserError: as of `evaluate_frozen`; or the run folder is another run's, or its training fails.
        ConfigError: a set does not store the frames that the stride asks for.
    """
    folder = Path(config.run.dir)
    stop_file = heed_stop_file(folder, rank.stop, rank.heartbeat)
    with ExitStack() as opened:
        opened.enter_context(only_run(folder) if rank.group.is_first else nullcontext())
        train, test = (
            opened.enter_context(closing(ShardSet(url, config.data.cache, config.data)))
            for url in (train_url, test_url)
        )
        check_split(train_url, train, test_url, test, told=rank.group.is_first)
        lesson = Task(train_url, train, test, subject.shown(config.clips), config)
        clips = _test_clips(lesson, rank.group)
        described = described_by(subject, lesson)
        pupil = pupil_of(subject, lesson, rank.group)
        trainer = opened.enter_context(assembled(pupil, lesson, described, rank))
        outcome = ClassifierResult(trainer.fit())
        if outcome.is_done:
            outcome = _tested(trainer, clips, lesson, rank)
        rank.group.barrier()
    if not outcome.is_done:
        stop_file.unlink(missing_ok=True)
    return outcome


def described_by(subject: EncoderUnderTest, lesson: Task) -> dict[str, Any]:
    """The configuration as checkpoints have it, with what no file can say beforehand."""
    described = dataclasses.asdict(lesson.config)
    described["clips"] |= dataclasses.asdict(lesson.geometry)
    described["encoder"] = dataclasses.asdict(subject.encoder.config)
    described["classes"] = list(lesson.classes)
    described["made_of"] = {"encoder": digest_of(subject.encoder), "train_set": lesson.train.manifest.digest}
    return described


def pupil_of(subject: EncoderUnderTest, lesson: Task, group: ProcessGroup) -> Trainee:
    """What learns, the same on all ranks at the start."""
    config = lesson.config
    if isinstance(config, FinetuneEvaluation):
        return _whole(subject.encoder, lesson, config.finetune, group)
    recalibrates = config.recalibrate if isinstance(config, LinearEvaluation) else None
    encoder = subject.encoder.to(group.device)
    if subject.is_untrained if recalibrates is None else recalibrates:
        recalibrate(encoder, recalibration_clips(lesson.train, lesson.geometry, config.data, group))
    return _on_frozen(encoder, lesson, group)


def _whole(encoder: Encoder, lesson: Task, config: FinetuneConfig, group: ProcessGroup) -> Trainee:
    """All of the encoder, and a linear layer."""
    own = dataclasses.replace(encoder.config, batch_norm=config.batch_norm, checkpointing=config.checkpointing)
    learning = Encoder(own)
    learning.load_state_dict(encoder.state_dict())
    torch.manual_seed(lesson.config.run.seed)
    network = Classifier(learning, len(lesson.classes))
    return Trainee(network.to(group.device).train(), normalise, learning, config.dropout)


def _on_frozen(encoder: Encoder, lesson: Task, group: ProcessGroup) -> Trainee:
    """A linear layer on features of unit length."""
    torch.manual_seed(lesson.config.run.seed)
    network = LinearLayer(encoder.feature_dim, len(lesson.classes))
    encoder.eval()
    autocasts = lesson.config.train.precision == "bfloat16"

    @torch.no_grad()
    def features(clips: torch.Tensor) -> torch.Tensor:
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=autocasts):
            pooled = encoder(normalise(clips)).pooled
        return normalize(pooled.float(), dim=1)

    return Trainee(network.to(group.device).train(), features, encoder, dropout=0.0)


@contextmanager
def assembled(
    pupil: Trainee, lesson: Task, described: dict[str, Any], rank: RankContext
) -> Iterator[ClassifierTrainer]:
    """The run's parts, put together and brought to where the newest checkpoint left off."""
    config, group = lesson.config, rank.group
    learner = ClassifierState(pupil.network)
    checkpoints = CheckpointManager(
        config.checkpoint.folder or f"{config.run.dir}/checkpoints", group, config.checkpoint
    )
    with listening(Path(config.run.dir), group, rank.birth, Console(sys.stderr), nullcontext()) as listeners:
        snapshot = resume(learner, checkpoints, described, listeners, course=IMMUTABLE_KEYS)
        start = snapshot.step if snapshot else 0
        if group.is_first:
            Folder(config.run.dir).write(RUN_CONFIG, dump_config(config).encode())
        if config.train.compile:
            pupil.encoder.compile()
        with _loading(lesson, group, start, listeners) as loader:
            objective = ClassifierLoss(pupil.network, autocast=config.train.precision == "bfloat16")
            engine = build_engine(
                objective, config.optimizer, config.train, group, snapshot, config.supervise.collective_seconds
            )
            schedule = schedule_of(config.train, config.optimizer, loader.steps_per_epoch)
            tell_start(listeners, snapshot, schedule, checkpoints)
            yield ClassifierTrainer(
                engine=engine,
                learner=learner,
                group=group,
                schedule=schedule,
                checkpoints=checkpoints,
                checkpoint_every=config.checkpoint.every,
                config=described,
                batches=batches_of(loader, group),
                settings=config.train,
                listeners=listeners,
                start=start,
                progress=snapshot.progress if snapshot else Progress(),
                name_of=loader.name_of,
                stop=rank.stop,
                heartbeat=rank.heartbeat,
                objective=objective,
                prepare=pupil.prepare,
                num_features=pupil.encoder.feature_dim,
                dropout=pupil.dropout,
                seed=config.run.seed,
            )


@contextmanager
def _loading(lesson: Task, group: ProcessGroup, start: int, listeners: Sequence[Listener]) -> Iterator[LabelledLoader]:
    config = lesson.config
    loader = LabelledLoader(
        LabelledConfig(**vars(config.data), train=lesson.train_url, **dataclasses.asdict(lesson.geometry)),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        rank=group.rank,
        num_ranks=group.size,
        grid=None,
        device=group.device,
        start_step=start,
        bad_samples=Path(config.run.dir) / of_rank("bad_samples", group),
        listen=lambda report: tell(listeners, report),
    )
    try:
        yield loader
    finally:
        loader.close()


def _test_clips(lesson: Task, group: ProcessGroup) -> ProbeClips:
    """Of this rank's share of the test videos."""
    return ProbeClips(
        lesson.test,
        lesson.geometry,
        device=group.device,
        decoder_device=lesson.config.data.decoder_device(group.device),
        num_clips=lesson.config.clips.count,
        num_crops=lesson.config.clips.crops,
        positions=share_of(len(lesson.test), group),
        batch_videos=1,
        threads=num_threads(),
    )


def _tested(trainer: ClassifierTrainer, clips: ProbeClips, lesson: Task, rank: RankContext) -> ClassifierResult:
    """The scores of the mean probabilities over a video's clips; all ranks must ask together."""
    group, objective = rank.group, trainer.objective
    trainer.learner.share_statistics(group)
    objective.eval()

    def probabilities(part: torch.Tensor) -> torch.Tensor:
        return objective.scores(trainer.prepare(part)).softmax(dim=1)

    told = watched(clips, len(clips), f"{len(lesson.test)} test videos") if group.is_first else clips
    with told_by(group):
        own = mean_over_clips(probabilities, len(lesson.classes), _while_wanted(told, rank))
        check_finite(own, clips.name_of)
    if group.sum(torch.tensor(float(rank.stop.is_asked), device=group.device)):
        return ClassifierResult(is_done=False)
    means = gather_features(own, len(lesson.test), group)
    if not group.is_first:
        return ClassifierResult(is_done=True)
    answers = answers_from_scores(means.vectors, means.labels)
    return ClassifierResult(True, score(answers, lesson.classes, lesson.config.bootstrap))


def _while_wanted(batches: Iterable[ClipBatch], rank: RankContext) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Clips and labels, until this rank is asked to stop; each is a sign of life."""
    for batch in batches:
        rank.heartbeat.enters(EVALUATING)
        if rank.stop.is_asked:
            return
        yield batch.clips, batch.labels
