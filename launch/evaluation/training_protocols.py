"""Protocols that train a classifier: composed like pre-training, then scored on the mean over a video's clips."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dataloading.loader.config import LabelledConfig
from dataloading.loader.loader import LabelledLoader
from dataloading.loader.probe_clips import ClipBatch, ProbeClips
from launch.evaluation.config import TrainingEvaluation
from launch.evaluation.encoder_under_test import EncoderUnderTest
from launch.evaluation.inputs import open_split, rank_clips
from launch.evaluation.trainee import Task, Trainee, build_trainee
from launch.run import parts
from launch.run.parts import RankContext, errors_name_rank
from launch.run.run_lock import hold_run_lock
from launch.supervision.deepspeed_launcher import watch_stop_file
from launch.terminal.progress import track
from mcl_dist.checkpoint import CheckpointManager, Progress, Snapshot
from mcl_dist.config import RUN_CONFIG, dump_config
from mcl_dist.distributed.heartbeat import EVALUATING
from mcl_dist.evaluation.classifier import ClassifierLoss
from mcl_dist.evaluation.classifier_trainer import ClassifierState, ClassifierTrainer
from mcl_dist.evaluation.feature_cache import module_digest
from mcl_dist.evaluation.features import check_finite, gather_features, mean_over_clips
from mcl_dist.evaluation.metrics import Scores, predictions_from_scores, score
from mcl_dist.events import Listener, emit
from mcl_dist.run_log.listeners import Console
from mcl_dist.storage.folder import Folder

# Keys that determine the samples of a step, their clips and the trained network. A run cannot resume with other values.
IMMUTABLE_KEYS = (
    "run.seed", "train.global_batch", "data.lanes", "data.shuffle_window", "clips.frames", "clips.stride", "clips.crop",
    "optimizer.name", "made_of.encoder", "made_of.train_set",
)  # fmt: skip


class ClassifierResult(NamedTuple):
    """Whether the protocol ran to its end, False after a stop request; with the scores on the first rank."""

    is_done: bool
    scores: Scores | None = None


def train_and_test(
    under_test: EncoderUnderTest, train_url: str, test_url: str, config: TrainingEvaluation, rank: RankContext
) -> ClassifierResult:
    """Train a classifier on one set, from its newest checkpoint, and test it on the other (METHOD.md, section 6).

    Raises:
        UserError: as in `evaluate_frozen`; or the run folder belongs to another run, or the training fails.
        ConfigError: a set does not store the frames that the stride needs.
    """
    folder, group = Path(config.run.dir), rank.group
    stop_file = watch_stop_file(folder, rank.stop, rank.heartbeat)
    with ExitStack() as stack:
        stack.enter_context(hold_run_lock(folder) if group.is_first else nullcontext())
        train, test = stack.enter_context(open_split(train_url, test_url, config.data, group))
        task = Task(train_url, train, test, under_test.clip_geometry(config.clips), config)
        test_clips = rank_clips(test, task.geometry, group, config.data, config.clips)
        run_config = checkpoint_config(under_test, task)
        trainee = build_trainee(under_test, task, group)
        trainer = stack.enter_context(compose_classifier_trainer(trainee, task, run_config, rank))
        result = ClassifierResult(trainer.fit())
        if result.is_done:
            result = _test(trainer, test_clips, task, rank)
        group.barrier()
    if not result.is_done:
        stop_file.unlink(missing_ok=True)
    return result


def checkpoint_config(under_test: EncoderUnderTest, task: Task) -> dict[str, Any]:
    """The configuration that checkpoints store, with the digests and shapes that the encoder and the sets determine."""
    config = asdict(task.config)
    config["clips"] |= asdict(task.geometry)
    config["encoder"] = asdict(under_test.encoder.config)
    config["classes"] = list(task.classes)
    config["made_of"] = {"encoder": module_digest(under_test.encoder), "train_set": task.train.manifest.digest}
    return config


@contextmanager
def compose_classifier_trainer(
    trainee: Trainee, task: Task, run_config: dict[str, Any], rank: RankContext
) -> Iterator[ClassifierTrainer]:
    """Build the parts of a run, restore its newest checkpoint, and yield the trainer; close the parts at the end."""
    config, group = task.config, rank.group
    state = ClassifierState(trainee.network)
    checkpoints = parts.open_checkpoints(config.run, config.checkpoint, group)
    console, no_metrics = Console(sys.stderr), nullcontext()
    with parts.open_listeners(Path(config.run.dir), group, rank.start_info, console, no_metrics) as listeners:
        snapshot = parts.resume(state, checkpoints, run_config, listeners, immutable_keys=IMMUTABLE_KEYS)
        if group.is_first:
            Folder(config.run.dir).write(RUN_CONFIG, dump_config(config).encode())
        if config.train.compile:
            trainee.encoder.compile()
        with closing(_build_loader(task, rank, snapshot.step if snapshot else 0, listeners)) as loader:
            trainer = _build_trainer(trainee, config, run_config, rank, state, checkpoints, snapshot, loader, listeners)
            parts.emit_start(listeners, snapshot, trainer.schedule, checkpoints)
            yield trainer


def _build_loader(task: Task, rank: RankContext, start_step: int, listeners: Sequence[Listener]) -> LabelledLoader:
    config, group = task.config, rank.group
    return LabelledLoader(
        LabelledConfig(**vars(config.data), train=task.train_url, **asdict(task.geometry)),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        rank=group.rank,
        num_ranks=group.size,
        grid=None,
        device=group.device,
        start_step=start_step,
        bad_samples=Path(config.run.dir) / parts.rank_file_name("bad_samples", group),
        listen=lambda report: emit(listeners, report),
    )


def _build_trainer(
    trainee: Trainee,
    config: TrainingEvaluation,
    run_config: dict[str, Any],
    rank: RankContext,
    state: ClassifierState,
    checkpoints: CheckpointManager,
    snapshot: Snapshot | None,
    loader: LabelledLoader,
    listeners: Sequence[Listener],
) -> ClassifierTrainer:
    objective = ClassifierLoss(trainee.network, autocast=config.train.precision == "bfloat16")
    timeout = config.supervise.collective_seconds
    return ClassifierTrainer(
        engine=parts.build_engine(objective, config.optimizer, config.train, rank.group, snapshot, timeout),
        state=state,
        group=rank.group,
        schedule=parts.build_schedule(config.train, config.optimizer, loader.steps_per_epoch),
        checkpoints=checkpoints,
        checkpoint_every=config.checkpoint.every,
        run_config=run_config,
        batches=parts.rank_batches(loader, rank.group),
        config=config.train,
        listeners=listeners,
        start=snapshot.step if snapshot else 0,
        progress=snapshot.progress if snapshot else Progress(),
        name_of=loader.name_of,
        stop=rank.stop,
        heartbeat=rank.heartbeat,
        objective=objective,
        prepare=trainee.prepare,
        num_features=trainee.encoder.feature_dim,
        dropout=trainee.dropout,
        seed=config.run.seed,
    )


def _test(trainer: ClassifierTrainer, clips: ProbeClips, task: Task, rank: RankContext) -> ClassifierResult:
    """Score the mean probabilities over a video's clips; all ranks must call it together."""
    group, objective = rank.group, trainer.objective
    trainer.state.average_statistics(group)
    objective.eval()

    def probabilities(part: torch.Tensor) -> torch.Tensor:
        return objective.scores(trainer.prepare(part)).softmax(dim=1)

    batches = track(clips, len(clips), f"{len(task.test)} test videos") if group.is_first else clips
    with errors_name_rank(group):
        own = mean_over_clips(probabilities, len(task.classes), _until_stopped(batches, rank))
        check_finite(own, clips.name_of)
    if group.sum(torch.tensor(float(rank.stop.is_requested), device=group.device)):
        return ClassifierResult(is_done=False)
    means = gather_features(own, len(task.test), group)
    if not group.is_first:
        return ClassifierResult(is_done=True)
    predictions = predictions_from_scores(means.vectors, means.labels)
    return ClassifierResult(True, score(predictions, task.classes, task.config.bootstrap))


def _until_stopped(batches: Iterable[ClipBatch], rank: RankContext) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield clips and labels until a stop request; each batch beats the heartbeat."""
    for batch in batches:
        rank.heartbeat.enter_phase(EVALUATING)
        if rank.stop.is_requested:
            return
        yield batch.clips, batch.labels
