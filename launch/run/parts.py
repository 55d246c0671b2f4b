"""Parts of every run on ranks: network, listeners, checkpoints, resuming, engine, schedule, batches, errors."""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dataloading.loader.loader import Delivered, Loader
from launch.run.config import RunConfig
from mcl_dist.checkpoint import CheckpointConfig, CheckpointManager, CorruptCheckpointError, Snapshot
from mcl_dist.distributed.heartbeat import Heartbeat
from mcl_dist.distributed.process_group import ProcessGroup, set_collective_timeout
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import RankError, UserError
from mcl_dist.events import Failed, Listener, Notice, Started, emit
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, LossModule, Network
from mcl_dist.model.pretrained_weights import InitialConfig, initialise
from mcl_dist.objective.schedule import Schedule
from mcl_dist.run_log.goodput import GoodputTracker, StartInfo
from mcl_dist.run_log.listeners import Console, EventLog, MetricsFile
from mcl_dist.training.config import TrainConfig
from mcl_dist.training.deepspeed_engine import Engine, OptimizerConfig
from mcl_dist.training.training_state import TrainingState

ARCHITECTURE = ("encoder", "heads", "classes")  # sections that determine the shapes of the tensors


@dataclass(frozen=True)
class RankContext:
    """This process in a run: its process group, its stop request, its heartbeat and the reason of its start."""

    group: ProcessGroup
    stop: StopRequest
    heartbeat: Heartbeat
    start_info: StartInfo


def build_initial_network(
    seed: int, encoder: EncoderConfig, heads: HeadsConfig, initial: InitialConfig
) -> tuple[Network, list[str]]:
    """Build a pre-training network, equal on all ranks; returns also the parameters that the weights leave random."""
    torch.manual_seed(seed)
    network = Network(encoder, heads)
    return network, initialise(network, initial)


@contextmanager
def open_listeners(
    folder: Path,
    group: ProcessGroup,
    start_info: StartInfo,
    console: Console,
    metrics_server: AbstractContextManager[Listener | None],
) -> Iterator[list[Listener]]:
    """Yield this rank's listeners: event log and served metrics; on the first rank also console, metrics file, goodput.

    A `UserError` from the block is logged as `Failed` and raised again.
    """
    listeners: list[Listener] = [EventLog(folder / rank_file_name("log", group))]
    if group.is_first:
        listeners += [console, MetricsFile(folder / "metrics.jsonl")]
    try:
        with metrics_server as metrics:
            all_listeners: list[Listener] = [*listeners, *([metrics] if metrics else [])]
            if group.is_first:
                all_listeners.append(GoodputTracker(folder, all_listeners, start_info))
            yield all_listeners
    except UserError as error:
        with suppress(UserError):  # a full disk may be the error, and then the log cannot be written either
            emit(listeners, Failed(str(error)))
        raise


def rank_file_name(name: str, group: ProcessGroup) -> str:
    """Name of a rank's own `.jsonl` file; the first rank's has no number."""
    return f"{name}.jsonl" if group.is_first else f"{name}-{group.rank:05d}.jsonl"


def open_checkpoints(run: RunConfig, checkpoint: CheckpointConfig, group: ProcessGroup) -> CheckpointManager:
    """The checkpoints of a run: in `checkpoint.folder`, else below the run folder."""
    return CheckpointManager(checkpoint.folder or f"{run.dir}/checkpoints", group, checkpoint)


def resume(
    state: TrainingState,
    checkpoints: CheckpointManager,
    config: dict[str, Any],
    listeners: Sequence[Listener],
    *,
    immutable_keys: Sequence[str],
) -> Snapshot | None:
    """Restore the newest good checkpoint into the training state; return its snapshot, None without a checkpoint.

    The immutable keys of the configuration must equal the checkpoint's. Refused checkpoints are emitted as events.

    Raises:
        UserError: the checkpoint belongs to another run.
    """
    step, refused = checkpoints.latest(lambda snapshot, url: _check_shapes(snapshot, url, state, config))
    for event in refused:
        emit(listeners, event)
    if step is None:
        return None
    snapshot, url = checkpoints.load(step), checkpoints.step_url(step)
    _check_same_run(snapshot.config, config, url, immutable_keys)
    state.restore(snapshot, url)
    return snapshot


def _check_shapes(snapshot: Snapshot, url: str, state: TrainingState, config: dict[str, Any]) -> None:
    """Raise a `CorruptCheckpointError` if a checkpoint with the run's architecture has tensors that do not fit it."""
    now = json.loads(json.dumps(config))
    is_same = all(snapshot.config.get(section) == now.get(section) for section in ARCHITECTURE)
    if is_same and (difference := state.first_mismatch(snapshot)) is not None:
        raise CorruptCheckpointError(url, f"its tensors do not fit its own configuration ({difference})")


def _check_same_run(stored: dict[str, Any], now: dict[str, Any], url: str, immutable_keys: Sequence[str]) -> None:
    """Raise a `UserError` that names the first immutable key with another value than the checkpoint's."""
    for path in immutable_keys:
        section, key = path.split(".")
        if (made_with := stored.get(section, {}).get(key)) != now[section][key]:
            problem = f"made with {path}={made_with}, now {now[section][key]}"
            raise UserError(f"{url}: {problem}; set it back, or start another run in another run.dir")


def build_engine(
    objective: LossModule,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    group: ProcessGroup,
    snapshot: Snapshot | None,
    collective_seconds: float,
) -> Engine:
    """Build the DeepSpeed engine, restore the optimizer state from the snapshot and set the collectives' timeout.

    The timeout is that of every process group except the checkpoint group.
    """
    engine = Engine(objective, optimizer, batch_per_rank=train.batch_per_rank(group.size), accumulate=train.accumulate)
    set_collective_timeout(collective_seconds)
    if snapshot:
        engine.load_optimizer_state(snapshot.optimizer, snapshot.step)
    return engine


def build_schedule(train: TrainConfig, optimizer: OptimizerConfig, steps_per_epoch: int) -> Schedule:
    """Build the schedule: total steps, and learning rate by step."""
    total = train.steps or train.epochs * steps_per_epoch
    return Schedule(optimizer.base_rate(train.global_batch), steps_per_epoch, total, optimizer.warmup_epochs)


@contextmanager
def errors_name_rank(group: ProcessGroup) -> Iterator[None]:
    """Within, a `UserError` becomes a `RankError` that names the rank: every rank reads other files than the others."""
    try:
        yield
    except UserError as error:
        raise RankError(f"rank {group.rank}: {error}" if group.size > 1 else str(error)) from error


def rank_batches(loader: Loader[Delivered], group: ProcessGroup) -> Iterator[Delivered]:
    """Yield the loader's batches; its errors name this rank."""
    with errors_name_rank(group):
        yield from loader


def emit_start(
    listeners: Sequence[Listener], snapshot: Snapshot | None, schedule: Schedule, checkpoints: CheckpointManager
) -> None:
    """Emit `Started`, and before it a `Notice` if the schedule is not the checkpoint's."""
    start, now = snapshot.step if snapshot else 0, asdict(schedule)
    if snapshot and snapshot.schedule != now:
        stored = snapshot.schedule
        changes = (f"{key} {stored.get(key)}, now {now[key]}" for key in now if stored.get(key) != now[key])
        emit(listeners, Notice(f"the schedule differs from the checkpoint's: {', '.join(changes)}"))
    emit(listeners, Started(start, schedule.total_steps, checkpoints.step_url(start) if snapshot else None))
