"""The composition root of pre-training: build the parts, bring them to the newest checkpoint, hand over a trainer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch

from dataloading.loader.loader import TubeletLoader
from launch.run.config import PretrainConfig
from launch.run.parts import batches_of, build_engine, listening, of_rank, resume, schedule_of, tell_start
from launch.telemetry.training import exporting
from mcl_dist.checkpoint import CheckpointManager, Progress
from mcl_dist.config import dump_config
from mcl_dist.distributed.heartbeat import Heartbeat
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.events import Listener, Notice, tell
from mcl_dist.model.network import Network
from mcl_dist.model.pretrained_weights import initialise
from mcl_dist.objective.flops import operations_per_video
from mcl_dist.objective.momentum_encoder import NUM_KEYS, MomentumEncoder
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.objective.objective import Objective
from mcl_dist.run_log.goodput import StartInfo
from mcl_dist.run_log.listeners import Console
from mcl_dist.storage.folder import Folder
from mcl_dist.training.pretrain_state import PretrainState
from mcl_dist.training.pretrain_step import Evaluate, PretrainTrainer


@contextmanager
def assembled(
    config: PretrainConfig,
    group: ProcessGroup,
    device: torch.device,
    stop: StopRequest,
    heartbeat: Heartbeat,
    birth: StartInfo,
) -> Iterator[PretrainTrainer]:
    """The run's parts, put together and brought to where the newest checkpoint left off."""
    autocast = config.train.precision == "bfloat16"
    network, at_random = _network(config)
    learner = _learner(config, network, group, device, autocast=autocast)
    folder = config.checkpoint.folder or f"{config.run.dir}/checkpoints"
    checkpoints = CheckpointManager(folder, group, config.checkpoint)
    exported = nullcontext() if config.monitoring.port is None else exporting(config, group, device)
    with listening(Path(config.run.dir), group, birth, Console(), exported) as listeners:
        snapshot = resume(learner, checkpoints, dataclasses.asdict(config), listeners, course=IMMUTABLE_KEYS)
        start = snapshot.step if snapshot else 0
        if group.is_first:
            Folder(config.run.dir).write("config.yaml", dump_config(config).encode())
        if not snapshot and config.objective.fill_queue:
            _fill_queue(learner, config, group, device)
        if config.train.compile:
            learner.compile()
        with (
            _scoring(config, group, listeners, stop) as evaluate,
            _loading(config, group, device, start, listeners) as loader,
        ):
            objective = Objective(
                learner.network,
                temperature=config.objective.temperature,
                autocast=autocast,
                alignment_layer=config.objective.alignment_layer,
            )
            engine = build_engine(
                objective, config.optimizer, config.train, group, snapshot, config.supervise.collective_seconds
            )
            schedule = schedule_of(config.train, config.optimizer, loader.steps_per_epoch)
            if config.initial.weights and not snapshot:
                tell(listeners, Notice(_taken(config.initial.weights, at_random)))
            if loader.num_left_out:
                tell(listeners, Notice(f"{loader.num_left_out} videos are too short for a clip, left out"))
            tell_start(listeners, snapshot, schedule, checkpoints)
            yield PretrainTrainer(
                engine=engine,
                learner=learner,
                group=group,
                schedule=schedule,
                losses=config.objective,
                checkpoints=checkpoints,
                checkpoint_every=config.checkpoint.every,
                config=dataclasses.asdict(config),
                batches=batches_of(loader, group),
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
    config: PretrainConfig, network: Network, group: ProcessGroup, device: torch.device, *, autocast: bool
) -> PretrainState:
    """The network with its momentum encoder and queue, equal on all ranks."""
    seed = config.run.seed
    network.to(device).train()
    momentum = MomentumEncoder(network, group, seed=seed, autocast=autocast)
    queue = NegativeQueue.random(
        config.objective.queue,
        config.heads.dim,
        torch.Generator().manual_seed(seed),
        device,
        group=group,
        sharded=config.objective.negatives == "sharded",
    )
    return PretrainState(network, momentum, queue)


@contextmanager
def _loading(
    config: PretrainConfig, group: ProcessGroup, device: torch.device, start: int, listeners: Sequence[Listener] = ()
) -> Iterator[TubeletLoader]:
    loader = TubeletLoader(
        config.data,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        rank=group.rank,
        num_ranks=group.size,
        grid=config.encoder.grid(config.data.frames, config.data.crop),
        device=device,
        start_step=start,
        bad_samples=Path(config.run.dir) / of_rank("bad_samples", group),
        listen=lambda report: tell(listeners, report),
    )
    try:
        yield loader
    finally:
        loader.close()


@contextmanager
def _scoring(
    config: PretrainConfig, group: ProcessGroup, listeners: Sequence[Listener], stop: StopRequest
) -> Iterator[Evaluate]:
    """What scores encoders on held-out videos, where that was asked for."""
    if config.evaluate.every is None:
        yield lambda *_: None
        return
    from launch.evaluation.online_knn import OnlineKnn  # and with it what only probes need

    with closing(OnlineKnn(config, group, lambda event: tell(listeners, event), stop)) as held_out:
        yield held_out


def _fill_queue(learner: PretrainState, config: PretrainConfig, group: ProcessGroup, device: torch.device) -> None:
    """Enqueue keys of the first batches, as many as the queue takes; training then sees these batches again."""
    num_batches = math.ceil(config.objective.queue / (NUM_KEYS * config.train.global_batch))
    with _loading(config, group, device, start=0) as loader:
        for step, batch in zip(range(num_batches), batches_of(loader, group), strict=False):
            learner.queue.enqueue(learner.momentum.encode(batch.views, step).inter_all)


# What decides which samples a step holds, what shapes go through it and what the optimizer's state means: a run that
# changed these is another run.
IMMUTABLE_KEYS = (
    "run.seed", "train.global_batch", "data.lanes", "data.shuffle_window", "data.min_windows", "data.frames",
    "data.stride", "data.crop", "objective.queue", "optimizer.name",
)  # fmt: skip
