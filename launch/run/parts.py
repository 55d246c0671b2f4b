"""Parts that every run on ranks is composed of: listeners, the newest checkpoint, the engine, the schedule."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from dataloading.loader.loader import Delivered, Loader
from mcl_dist.checkpoint import CheckpointManager, DamagedError, Snapshot
from mcl_dist.distributed.process_group import ProcessGroup, limit_waiting
from mcl_dist.errors import RankError, UserError
from mcl_dist.events import Failed, Listener, Notice, Started, tell
from mcl_dist.model.loss_module import LossModule
from mcl_dist.objective.schedule import Schedule
from mcl_dist.run_log.goodput import GoodputTracker, StartInfo
from mcl_dist.run_log.listeners import Console, EventLog, MetricsFile
from mcl_dist.training.deepspeed_engine import Engine, OptimizerConfig
from mcl_dist.training.trainer import TrainConfig, TrainingState

ARCHITECTURE = ("encoder", "heads", "classes")  # sections that say of which shapes the tensors are


@contextmanager
def listening(
    folder: Path,
    group: ProcessGroup,
    birth: StartInfo,
    console: Console,
    exported: AbstractContextManager[Listener | None],
) -> Iterator[list[Listener]]:
    """A log on every rank, and Prometheus where asked for; on the first also the terminal and the metrics' file."""
    listeners: list[Listener] = [EventLog(folder / of_rank("log", group))]
    if group.is_first:
        listeners += [console, MetricsFile(folder / "metrics.jsonl")]
    try:
        with exported as metrics:
            everyone: list[Listener] = [*listeners, *([metrics] if metrics else [])]
            if group.is_first:
                everyone.append(GoodputTracker(folder, everyone, birth))
            yield everyone
    except UserError as error:
        with suppress(UserError):  # of a disk that is full, perhaps for this very reason
            tell(listeners, Failed(str(error)))
        raise


def of_rank(name: str, group: ProcessGroup) -> str:
    """A file of lines that every rank has for itself: the first one's bears the name alone."""
    return f"{name}.jsonl" if group.is_first else f"{name}-{group.rank:05d}.jsonl"


def resume(
    learner: TrainingState,
    checkpoints: CheckpointManager,
    config: dict[str, Any],
    listeners: Sequence[Listener],
    *,
    course: Sequence[str],
) -> Snapshot | None:
    """Bring the learner to the newest good checkpoint, if there is one.

    Args:
        learner: as the run would start without one.
        checkpoints: of the run.
        config: of the run, as checkpoints have it.
        listeners: are told of checkpoints that cannot be used.
        course: keys of the configuration that a run may not change on its way.

    Raises:
        UserError: they are another run's.
    """
    step, refused = checkpoints.latest(lambda snapshot, url: _check_itself(snapshot, url, learner, config))
    for event in refused:
        tell(listeners, event)
    if step is None:
        return None
    snapshot, url = checkpoints.load(step), checkpoints.step_url(step)
    _check_same_run(snapshot.config, config, url, course)
    learner.restore(snapshot, url)
    return snapshot


def _check_itself(snapshot: Snapshot, url: str, learner: TrainingState, config: dict[str, Any]) -> None:
    """Look whether a checkpoint holds what its own configuration says, where that is the run's.

    Raises:
        DamagedError: when it does not.
    """
    now = json.loads(json.dumps(config))
    if all(snapshot.config.get(section) == now.get(section) for section in ARCHITECTURE):
        difference = learner.misfit(snapshot)
        if difference is not None:
            raise DamagedError(url, f"it does not hold what its configuration says ({difference})")


def _check_same_run(stored: dict[str, Any], now: dict[str, Any], url: str, course: Sequence[str]) -> None:
    for path in course:
        section, key = path.split(".")
        made_with = stored.get(section, {}).get(key)
        if made_with != now[section][key]:
            raise UserError(
                f"{url}: made with {path}={made_with}, now {now[section][key]}; "
                "set it back, or start another run in another run.dir"
            )


def build_engine(
    objective: LossModule,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    group: ProcessGroup,
    snapshot: Snapshot | None,
    collective_seconds: float,
) -> Engine:
    """The DeepSpeed engine of a run, with the snapshot's optimizer state if there is one.

    Args:
        objective: module whose parameters are trained.
        optimizer: of the run.
        train: batch size of the run.
        group: ranks of the run.
        snapshot: of the checkpoint that the run resumes from.
        collective_seconds: timeout of every process group except the checkpoint group.
    """
    engine = Engine(objective, optimizer, batch_per_rank=train.batch_per_rank(group.size), accumulate=train.accumulate)
    limit_waiting(collective_seconds)
    if snapshot:
        engine.load_optimizer_state(snapshot.optimizer, snapshot.step)
    return engine


def schedule_of(train: TrainConfig, optimizer: OptimizerConfig, steps_per_epoch: int) -> Schedule:
    """The length of a run, and its rates, by step."""
    total = train.steps or train.epochs * steps_per_epoch
    return Schedule(optimizer.base_rate(train.global_batch), steps_per_epoch, total, optimizer.warmup_epochs)


def batches_of(loader: Loader[Delivered], group: ProcessGroup) -> Iterator[Delivered]:
    """What the loader delivers; its errors name the rank that met them."""
    try:
        yield from loader
    except UserError as error:
        # No other rank reads what this one reads.
        raise RankError(f"rank {group.rank}: {error}") from error


def tell_start(
    listeners: Sequence[Listener], snapshot: Snapshot | None, schedule: Schedule, checkpoints: CheckpointManager
) -> None:
    """Tell where the run starts, and whether it goes on by another schedule than before."""
    start, now = snapshot.step if snapshot else 0, dataclasses.asdict(schedule)
    if snapshot and snapshot.schedule != now:
        tell(listeners, Notice(_other_schedule(snapshot.schedule, now)))
    tell(listeners, Started(start, schedule.total_steps, checkpoints.step_url(start) if snapshot else None))


def _other_schedule(stored: dict[str, Any], now: dict[str, Any]) -> str:
    changes = ", ".join(f"{key} {stored.get(key)} there, {now[key]} here" for key in now if stored.get(key) != now[key])
    return f"this run's schedule is not the checkpoint's: {changes}"
