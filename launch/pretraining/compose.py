"""The composition root of pre-training: build the parts, bring them to the newest checkpoint, hand over a trainer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from dataloading.loader.loader import Delivered, Loader, TubeletLoader
from launch.evaluation.config import SupervisedEvaluation
from launch.run.config import PretrainConfig
from launch.telemetry.training import exporting
from mcl_dist.checkpoint import Checkpoints, DamagedError, Progress, Snapshot
from mcl_dist.config import dump_config
from mcl_dist.distributed.heartbeat import Heartbeat
from mcl_dist.distributed.process_group import Ranks, limit_waiting
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import RankError, UserError
from mcl_dist.events import Failed, Listener, Notice, Started, tell
from mcl_dist.model.loss_module import LossModule
from mcl_dist.model.network import Network
from mcl_dist.model.pretrained_weights import initialise
from mcl_dist.objective.flops import operations_per_video
from mcl_dist.objective.momentum_encoder import NUM_KEYS, MomentumEncoder
from mcl_dist.objective.negative_queue import Queue
from mcl_dist.objective.objective import Objective
from mcl_dist.objective.schedule import Schedule
from mcl_dist.run_log.goodput import Birth, Ledger
from mcl_dist.run_log.listeners import Console, EventLog, MetricsFile
from mcl_dist.storage.folder import Folder
from mcl_dist.training.deepspeed_engine import Engine, OptimizerConfig
from mcl_dist.training.pretrain_state import Learner
from mcl_dist.training.pretrain_step import Evaluate, Pretrainer
from mcl_dist.training.trainer import Learning, TrainConfig


@contextmanager
def assembled(
    config: PretrainConfig, ranks: Ranks, device: torch.device, stop: StopRequest, heartbeat: Heartbeat, birth: Birth
) -> Iterator[Pretrainer]:
    """The run's parts, put together and brought to where the newest checkpoint left off."""
    autocast = config.train.precision == "bfloat16"
    network, at_random = _network(config)
    learner = _learner(config, network, ranks, device, autocast=autocast)
    folder = config.checkpoint.folder or f"{config.run.dir}/checkpoints"
    checkpoints = Checkpoints(folder, ranks, config.checkpoint)
    exported = nullcontext() if config.monitoring.port is None else exporting(config, ranks, device)
    with listening(Path(config.run.dir), ranks, birth, Console(), exported) as listeners:
        snapshot = resume(learner, checkpoints, dataclasses.asdict(config), listeners, course=COURSE)
        start = snapshot.step if snapshot else 0
        if ranks.is_first:
            Folder(config.run.dir).write("config.yaml", dump_config(config).encode())
        if not snapshot and config.objective.fill_queue:
            _fill_queue(learner, config, ranks, device)
        if config.train.compile:
            learner.compile()
        with (
            _scoring(config, ranks, listeners, stop) as evaluate,
            _loading(config, ranks, device, start, listeners) as loader,
        ):
            objective = Objective(
                learner.network,
                temperature=config.objective.temperature,
                autocast=autocast,
                alignment_layer=config.objective.alignment_layer,
            )
            engine = engine_of(objective, config, ranks, snapshot)
            schedule = schedule_of(config.train, config.optimizer, loader.steps_per_epoch)
            if config.initial.weights and not snapshot:
                tell(listeners, Notice(_taken(config.initial.weights, at_random)))
            if loader.num_left_out:
                tell(listeners, Notice(f"{loader.num_left_out} videos are too short for a clip, left out"))
            tell_start(listeners, snapshot, schedule, checkpoints)
            yield Pretrainer(
                engine=engine,
                learner=learner,
                ranks=ranks,
                schedule=schedule,
                losses=config.objective,
                checkpoints=checkpoints,
                checkpoint_every=config.checkpoint.every,
                config=dataclasses.asdict(config),
                batches=batches_of(loader, ranks),
                settings=config.train,
                listeners=listeners,
                start=start,
                progress=snapshot.progress if snapshot else Progress(),
                name_of=loader.name_of,
                stop=stop,
                heartbeat=heartbeat,
                operations=operations_per_video(config.encoder, config.heads, config.data.frames, config.data.crop),
                evaluate=evaluate,
                evaluate_every=config.evaluate.every,
            )


def engine_of(
    objective: LossModule, config: PretrainConfig | SupervisedEvaluation, ranks: Ranks, snapshot: Snapshot | None
) -> Engine:
    """What steps a run's parameters, with the optimizer's state where the run goes on; no group waits for ever then."""
    engine = Engine(
        objective,
        config.optimizer,
        batch_per_rank=config.train.batch_per_rank(ranks.count),
        accumulate=config.train.accumulate,
    )
    limit_waiting(config.supervise.collective_seconds)
    if snapshot:
        engine.load_optimizer_state(snapshot.optimizer, snapshot.step)
    return engine


def schedule_of(train: TrainConfig, optimizer: OptimizerConfig, steps_per_epoch: int) -> Schedule:
    """The length of a run, and its rates, by step."""
    total = train.steps or train.epochs * steps_per_epoch
    return Schedule(optimizer.base_rate(train.global_batch), steps_per_epoch, total, optimizer.warmup_epochs)


def tell_start(
    listeners: Sequence[Listener], snapshot: Snapshot | None, schedule: Schedule, checkpoints: Checkpoints
) -> None:
    """Tell where the run starts, and whether it goes on by another schedule than before."""
    start, now = snapshot.step if snapshot else 0, dataclasses.asdict(schedule)
    if snapshot and snapshot.schedule != now:
        tell(listeners, Notice(_other_schedule(snapshot.schedule, now)))
    tell(listeners, Started(start, schedule.total_steps, checkpoints.step_url(start) if snapshot else None))


def _network(config: PretrainConfig) -> tuple[Network, list[str]]:
    """As the seed or the initial weights make it, equal on all ranks; and the names that keep their random start."""
    torch.manual_seed(config.run.seed)
    network = Network(config.encoder, config.heads)
    return network, initialise(network, config.initial)


def _taken(file: str, at_random: Sequence[str]) -> str:
    """A line on what a run takes from a weights file."""
    parts = dict.fromkeys(name.partition(".")[0] for name in at_random)
    return f"initial weights from {file}; random: {', '.join(parts) or 'none'}"


def _learner(
    config: PretrainConfig, network: Network, ranks: Ranks, device: torch.device, *, autocast: bool
) -> Learner:
    """The network with its momentum encoder and queue, equal on all ranks."""
    seed = config.run.seed
    network.to(device).train()
    momentum = MomentumEncoder(network, ranks, seed=seed, autocast=autocast)
    queue = Queue.random(
        config.objective.queue,
        config.heads.dim,
        torch.Generator().manual_seed(seed),
        device,
        ranks=ranks,
        sharded=config.objective.negatives == "sharded",
    )
    return Learner(network, momentum, queue)


@contextmanager
def _loading(
    config: PretrainConfig, ranks: Ranks, device: torch.device, start: int, listeners: Sequence[Listener] = ()
) -> Iterator[TubeletLoader]:
    loader = TubeletLoader(
        config.data,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        rank=ranks.rank,
        num_ranks=ranks.count,
        grid=config.encoder.grid(config.data.frames, config.data.crop),
        device=device,
        start_step=start,
        bad_samples=Path(config.run.dir) / of_rank("bad_samples", ranks),
        listen=lambda report: tell(listeners, report),
    )
    try:
        yield loader
    finally:
        loader.close()


@contextmanager
def _scoring(
    config: PretrainConfig, ranks: Ranks, listeners: Sequence[Listener], stop: StopRequest
) -> Iterator[Evaluate]:
    """What scores encoders on held-out videos, where that was asked for."""
    if config.evaluate.every is None:
        yield lambda *_: None
        return
    from launch.evaluation.online_knn import HeldOut  # and with it what only probes need

    with closing(HeldOut(config, ranks, lambda event: tell(listeners, event), stop)) as held_out:
        yield held_out


def batches_of(loader: Loader[Delivered], ranks: Ranks) -> Iterator[Delivered]:
    """What the loader delivers; its errors name the rank that met them."""
    try:
        yield from loader
    except UserError as error:
        # No other rank reads what this one reads.
        raise RankError(f"rank {ranks.rank}: {error}") from error


def _fill_queue(learner: Learner, config: PretrainConfig, ranks: Ranks, device: torch.device) -> None:
    """Enqueue keys of the first batches, as many as the queue takes; training then sees these batches again."""
    num_batches = math.ceil(config.objective.queue / (NUM_KEYS * config.train.global_batch))
    with _loading(config, ranks, device, start=0) as loader:
        for step, batch in zip(range(num_batches), batches_of(loader, ranks), strict=False):
            learner.queue.enqueue(learner.momentum.encode(batch.views, step).inter_all)


def resume(
    learner: Learning,
    checkpoints: Checkpoints,
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


def _check_itself(snapshot: Snapshot, url: str, learner: Learning, config: dict[str, Any]) -> None:
    """Look whether a checkpoint holds what its own configuration says, where that is the run's.

    Raises:
        DamagedError: when it does not.
    """
    now = json.loads(json.dumps(config))
    if all(snapshot.config.get(section) == now.get(section) for section in ARCHITECTURE):
        difference = learner.misfit(snapshot)
        if difference is not None:
            raise DamagedError(url, f"it does not hold what its configuration says ({difference})")


def _other_schedule(stored: dict[str, Any], now: dict[str, Any]) -> str:
    changes = ", ".join(f"{key} {stored.get(key)} there, {now[key]} here" for key in now if stored.get(key) != now[key])
    return f"this run's schedule is not the checkpoint's: {changes}"


ARCHITECTURE = ("encoder", "heads", "classes")  # sections that say of which shapes the tensors are
# What decides which samples a step holds, what shapes go through it and what the optimizer's state means: a run that
# changed these is another run.
COURSE = (
    "run.seed", "train.global_batch", "data.lanes", "data.shuffle_window", "data.min_windows", "data.frames",
    "data.stride", "data.crop", "objective.queue", "optimizer.name",
)  # fmt: skip


def _check_same_run(stored: dict[str, Any], now: dict[str, Any], url: str, course: Sequence[str]) -> None:
    for path in course:
        section, key = path.split(".")
        made_with = stored.get(section, {}).get(key)
        if made_with != now[section][key]:
            raise UserError(
                f"{url}: made with {path}={made_with}, now {now[section][key]}; "
                "set it back, or start another run in another run.dir"
            )


@contextmanager
def listening(
    folder: Path, ranks: Ranks, birth: Birth, console: Console, exported: AbstractContextManager[Listener | None]
) -> Iterator[list[Listener]]:
    """A log on every rank, and Prometheus where asked for; on the first also the terminal and the metrics' file."""
    listeners: list[Listener] = [EventLog(folder / of_rank("log", ranks))]
    if ranks.is_first:
        listeners += [console, MetricsFile(folder / "metrics.jsonl")]
    try:
        with exported as metrics:
            everyone: list[Listener] = [*listeners, *([metrics] if metrics else [])]
            if ranks.is_first:
                everyone.append(Ledger(folder, everyone, birth))
            yield everyone
    except UserError as error:
        with suppress(UserError):  # of a disk that is full, perhaps for this very reason
            tell(listeners, Failed(str(error)))
        raise


def of_rank(name: str, ranks: Ranks) -> str:
    """A file of lines that every rank has for itself: the first one's bears the name alone."""
    return f"{name}.jsonl" if ranks.is_first else f"{name}-{ranks.rank:05d}.jsonl"
