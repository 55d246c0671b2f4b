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
from launch.evaluation.config import FinetuneConfig, FinetuneEvaluation, LinearEvaluation, SupervisedEvaluation
from launch.evaluation.encoder_under_test import Subject
from launch.evaluation.frozen_protocols import check_split, num_threads, recalibration_clips, told_by
from launch.pretraining.compose import batches_of, engine_of, listening, of_rank, resume, schedule_of, tell_start
from launch.run.run_lock import only_run
from launch.supervision.deepspeed_launcher import heed_stop_file
from launch.terminal.progress import watched
from mcl_dist.checkpoint import Checkpoints, Progress
from mcl_dist.config import RUN_CONFIG, dump_config
from mcl_dist.distributed.heartbeat import EVALUATING, Heartbeat
from mcl_dist.distributed.process_group import Ranks
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.evaluation.classifier import Classifier, ClassifierLoss, LinearLayer
from mcl_dist.evaluation.classifier_trainer import ClassifierLearner, SupervisedTrainer
from mcl_dist.evaluation.feature_cache import digest_of
from mcl_dist.evaluation.features import check_finite, gather_features, mean_over_clips, recalibrate, share_of
from mcl_dist.evaluation.metrics import Scores, answers_from_scores, score
from mcl_dist.events import Listener, tell
from mcl_dist.model.encoder import Encoder, normalise
from mcl_dist.run_log.goodput import Birth
from mcl_dist.run_log.listeners import Console
from mcl_dist.storage.folder import Folder

# What decides which samples a step holds, what they look like and what learns from them: changed, it is another run.
COURSE = (
    "run.seed", "train.global_batch", "data.lanes", "data.shuffle_window", "clips.frames", "clips.stride", "clips.crop",
    "optimizer.name", "made_of.encoder", "made_of.train_set",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rank:
    """This process in a run: its place among the ranks, and what watches it."""

    ranks: Ranks
    stop: StopRequest
    heartbeat: Heartbeat
    birth: Birth


class Outcome(NamedTuple):
    """Whether all was done, or a rank was asked to stop before; on the first rank also the scores."""

    is_done: bool
    scores: Scores | None = None


@dataclasses.dataclass(frozen=True)
class Pupil:
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
class Lesson:
    """What is learnt, and from what: a training set with its test set, shown in clips of one shape."""

    train_url: str
    train: ShardSet
    test: ShardSet
    geometry: ClipGeometry
    config: SupervisedEvaluation

    @property
    def classes(self) -> tuple[str, ...]:
        """Of both sets."""
        return self.train.manifest.classes


def evaluate_supervised(
    subject: Subject, train_url: str, test_url: str, config: SupervisedEvaluation, rank: Rank
) -> Outcome:
    """Train a classifier on the one set, from its newest checkpoint, and test it on the other (METHOD.md, section 6).

    Raises:
        UserError: as of `evaluate_frozen`; or the run folder is another run's, or its training fails.
        ConfigError: a set does not store the frames that the stride asks for.
    """
    folder = Path(config.run.dir)
    stop_file = heed_stop_file(folder, rank.stop, rank.heartbeat)
    with ExitStack() as opened:
        opened.enter_context(only_run(folder) if rank.ranks.is_first else nullcontext())
        train, test = (
            opened.enter_context(closing(ShardSet(url, config.data.cache, config.data)))
            for url in (train_url, test_url)
        )
        check_split(train_url, train, test_url, test, told=rank.ranks.is_first)
        lesson = Lesson(train_url, train, test, subject.shown(config.clips), config)
        clips = _test_clips(lesson, rank.ranks)
        described = described_by(subject, lesson)
        pupil = pupil_of(subject, lesson, rank.ranks)
        trainer = opened.enter_context(assembled(pupil, lesson, described, rank))
        outcome = Outcome(trainer.fit())
        if outcome.is_done:
            outcome = _tested(trainer, clips, lesson, rank)
        rank.ranks.barrier()
    if not outcome.is_done:
        stop_file.unlink(missing_ok=True)
    return outcome


def described_by(subject: Subject, lesson: Lesson) -> dict[str, Any]:
    """The configuration as checkpoints have it, with what no file can say beforehand."""
    described = dataclasses.asdict(lesson.config)
    described["clips"] |= dataclasses.asdict(lesson.geometry)
    described["encoder"] = dataclasses.asdict(subject.encoder.config)
    described["classes"] = list(lesson.classes)
    described["made_of"] = {"encoder": digest_of(subject.encoder), "train_set": lesson.train.manifest.digest}
    return described


def pupil_of(subject: Subject, lesson: Lesson, ranks: Ranks) -> Pupil:
    """What learns, the same on all ranks at the start."""
    config = lesson.config
    if isinstance(config, FinetuneEvaluation):
        return _whole(subject.encoder, lesson, config.finetune, ranks)
    recalibrates = config.recalibrate if isinstance(config, LinearEvaluation) else None
    encoder = subject.encoder.to(ranks.device)
    if subject.is_untrained if recalibrates is None else recalibrates:
        recalibrate(encoder, recalibration_clips(lesson.train, lesson.geometry, config.data, ranks))
    return _on_frozen(encoder, lesson, ranks)


def _whole(encoder: Encoder, lesson: Lesson, config: FinetuneConfig, ranks: Ranks) -> Pupil:
    """All of the encoder, and a linear layer."""
    own = dataclasses.replace(encoder.config, batch_norm=config.batch_norm, checkpointing=config.checkpointing)
    learning = Encoder(own)
    learning.load_state_dict(encoder.state_dict())
    torch.manual_seed(lesson.config.run.seed)
    network = Classifier(learning, len(lesson.classes))
    return Pupil(network.to(ranks.device).train(), normalise, learning, config.dropout)


def _on_frozen(encoder: Encoder, lesson: Lesson, ranks: Ranks) -> Pupil:
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

    return Pupil(network.to(ranks.device).train(), features, encoder, dropout=0.0)


@contextmanager
def assembled(pupil: Pupil, lesson: Lesson, described: dict[str, Any], rank: Rank) -> Iterator[SupervisedTrainer]:
    """The run's parts, put together and brought to where the newest checkpoint left off."""
    config, ranks = lesson.config, rank.ranks
    learner = ClassifierLearner(pupil.network)
    checkpoints = Checkpoints(config.checkpoint.folder or f"{config.run.dir}/checkpoints", ranks, config.checkpoint)
    with listening(Path(config.run.dir), ranks, rank.birth, Console(sys.stderr), nullcontext()) as listeners:
        snapshot = resume(learner, checkpoints, described, listeners, course=COURSE)
        start = snapshot.step if snapshot else 0
        if ranks.is_first:
            Folder(config.run.dir).write(RUN_CONFIG, dump_config(config).encode())
        if config.train.compile:
            pupil.encoder.compile()
        with _loading(lesson, ranks, start, listeners) as loader:
            objective = ClassifierLoss(pupil.network, autocast=config.train.precision == "bfloat16")
            engine = engine_of(objective, config, ranks, snapshot)
            schedule = schedule_of(config.train, config.optimizer, loader.steps_per_epoch)
            tell_start(listeners, snapshot, schedule, checkpoints)
            yield SupervisedTrainer(
                engine=engine,
                learner=learner,
                ranks=ranks,
                schedule=schedule,
                checkpoints=checkpoints,
                checkpoint_every=config.checkpoint.every,
                config=described,
                batches=batches_of(loader, ranks),
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
def _loading(lesson: Lesson, ranks: Ranks, start: int, listeners: Sequence[Listener]) -> Iterator[LabelledLoader]:
    config = lesson.config
    loader = LabelledLoader(
        LabelledConfig(**vars(config.data), train=lesson.train_url, **dataclasses.asdict(lesson.geometry)),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        rank=ranks.rank,
        num_ranks=ranks.count,
        grid=None,
        device=ranks.device,
        start_step=start,
        bad_samples=Path(config.run.dir) / of_rank("bad_samples", ranks),
        listen=lambda report: tell(listeners, report),
    )
    try:
        yield loader
    finally:
        loader.close()


def _test_clips(lesson: Lesson, ranks: Ranks) -> ProbeClips:
    """Of this rank's share of the test videos."""
    return ProbeClips(
        lesson.test,
        lesson.geometry,
        device=ranks.device,
        decoder_device=lesson.config.data.decoder_device(ranks.device),
        num_clips=lesson.config.clips.count,
        num_crops=lesson.config.clips.crops,
        positions=share_of(len(lesson.test), ranks),
        batch_videos=1,
        threads=num_threads(),
    )


def _tested(trainer: SupervisedTrainer, clips: ProbeClips, lesson: Lesson, rank: Rank) -> Outcome:
    """The scores of the mean probabilities over a video's clips; all ranks must ask together."""
    ranks, objective = rank.ranks, trainer.objective
    trainer.learner.share_statistics(ranks)
    objective.eval()

    def probabilities(part: torch.Tensor) -> torch.Tensor:
        return objective.scores(trainer.prepare(part)).softmax(dim=1)

    told = watched(clips, len(clips), f"{len(lesson.test)} test videos") if ranks.is_first else clips
    with told_by(ranks):
        own = mean_over_clips(probabilities, len(lesson.classes), _while_wanted(told, rank))
        check_finite(own, clips.name_of)
    if ranks.sum(torch.tensor(float(rank.stop.is_asked), device=ranks.device)):
        return Outcome(is_done=False)
    means = gather_features(own, len(lesson.test), ranks)
    if not ranks.is_first:
        return Outcome(is_done=True)
    answers = answers_from_scores(means.vectors, means.labels)
    return Outcome(True, score(answers, lesson.classes, lesson.config.bootstrap))


def _while_wanted(batches: Iterable[ClipBatch], rank: Rank) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Clips and labels, until this rank is asked to stop; each is a sign of life."""
    for batch in batches:
        rank.heartbeat.enters(EVALUATING)
        if rank.stop.is_asked:
            return
        yield batch.clips, batch.labels
