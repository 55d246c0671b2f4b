"""The composition root of pre-training: build the model, the loader and the trainer."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from dataloading.loader.loader import TubeletLoader
from launch.run import parts
from launch.run.config import PretrainConfig
from launch.run.parts import RankContext, build_initial_network
from launch.telemetry.training import serve_training_metrics
from mcl_dist.checkpoint import CheckpointManager, Progress, Snapshot
from mcl_dist.config import RUN_CONFIG, dump_config
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.events import Listener, Notice, emit
from mcl_dist.model.network import Network
from mcl_dist.objective.flops import flops_per_video
from mcl_dist.objective.momentum_encoder import NUM_KEYS, MomentumEncoder
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.objective.objective import Objective
from mcl_dist.run_log.listeners import Console
from mcl_dist.storage.folder import Folder
from mcl_dist.training.pretrain_state import PretrainState
from mcl_dist.training.pretrain_step import Evaluate, PretrainTrainer

# Keys that determine the samples of a step, the shapes of tensors and the meaning of the optimizer state. A run cannot
# resume with other values.
IMMUTABLE_KEYS = (
    "run.seed", "train.global_batch", "data.lanes", "data.shuffle_window", "data.min_windows", "data.frames",
    "data.stride", "data.crop", "objective.queue", "optimizer.name",
)  # fmt: skip


@contextmanager
def compose_trainer(config: PretrainConfig, rank: RankContext) -> Iterator[PretrainTrainer]:
    """Build the parts of a run, restore its newest checkpoint, and yield the trainer; close the parts at the end.

    Raises:
        UserError: the checkpoint belongs to another run, or the set, the weights or a file cannot be used.
        ConfigError: the set does not store the frames that `data.stride` needs.
    """
    group = rank.group
    network, random_names = build_initial_network(config.run.seed, config.encoder, config.heads, config.initial)
    state = _build_state(config, network, group)
    checkpoints = parts.open_checkpoints(config.run, config.checkpoint, group)
    run_folder, metrics_server = Path(config.run.dir), _metrics_server(config, group)
    with parts.open_listeners(run_folder, group, rank.start_info, Console(), metrics_server) as listeners:
        snapshot = parts.resume(state, checkpoints, asdict(config), listeners, immutable_keys=IMMUTABLE_KEYS)
        if group.is_first:
            Folder(config.run.dir).write(RUN_CONFIG, dump_config(config).encode())
        if not snapshot and config.objective.fill_queue:
            _fill_queue(config, state, group)
        if config.train.compile:
            state.compile()
        with (
            _open_evaluator(config, rank, listeners) as evaluate,
            closing(_build_loader(config, group, snapshot.step if snapshot else 0, listeners)) as loader,
        ):
            trainer = _build_trainer(config, rank, state, checkpoints, snapshot, loader, evaluate, listeners)
            if config.initial.weights and not snapshot:
                emit(listeners, Notice(_weights_message(config.initial.weights, random_names)))
            if loader.num_left_out:
                emit(listeners, Notice(f"{loader.num_left_out} videos are too short for a clip and are left out"))
            parts.emit_start(listeners, snapshot, trainer.schedule, checkpoints)
            yield trainer


def _build_state(config: PretrainConfig, network: Network, group: ProcessGroup) -> PretrainState:
    """The network with its momentum encoder and its queue of negatives, equal on all ranks."""
    seed = config.run.seed
    network.to(group.device).train()
    momentum = MomentumEncoder(network, group, seed=seed, autocast=_autocasts(config))
    queue = NegativeQueue.random(
        config.objective.queue,
        config.heads.dim,
        torch.Generator().manual_seed(seed),
        group.device,
        group=group,
        sharded=config.objective.negatives == "sharded",
    )
    return PretrainState(network, momentum, queue)


def _metrics_server(config: PretrainConfig, group: ProcessGroup) -> AbstractContextManager[Listener | None]:
    """Serve this rank's metrics to Prometheus, if `monitoring.port` is set."""
    if config.monitoring.port is None:
        return nullcontext()
    folders = {"run": config.run.dir, "cache": config.data.cache, "checkpoint": config.checkpoint.folder}
    return serve_training_metrics(config.monitoring, group, Path(config.run.dir), folders, config.train.precision)


def _fill_queue(config: PretrainConfig, state: PretrainState, group: ProcessGroup) -> None:
    """Fill the queue with keys of the first batches; training uses these batches again."""
    num_batches = math.ceil(config.objective.queue / (NUM_KEYS * config.train.global_batch))
    with closing(_build_loader(config, group, start_step=0)) as loader:
        for step, batch in zip(range(num_batches), parts.rank_batches(loader, group), strict=False):
            state.queue.enqueue(state.momentum.encode(batch.views, step).inter_all)


@contextmanager
def _open_evaluator(config: PretrainConfig, rank: RankContext, listeners: Sequence[Listener]) -> Iterator[Evaluate]:
    """The online kNN evaluation, or a function without scores if `evaluate.every` is not set."""
    if config.evaluate.every is None:
        yield lambda *_: None
        return
    from launch.evaluation.online_knn import OnlineKnn  # imports the probes, which other runs do not need

    folder, listen = Path(config.run.dir), lambda event: emit(listeners, event)
    with closing(OnlineKnn(config.evaluate, config.data, folder, rank.group, listen, rank.stop)) as online_knn:
        yield online_knn


def _build_loader(
    config: PretrainConfig, group: ProcessGroup, start_step: int, listeners: Sequence[Listener] = ()
) -> TubeletLoader:
    return TubeletLoader(
        config.data,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        rank=group.rank,
        num_ranks=group.size,
        grid=config.encoder.grid(config.data.frames, config.data.crop),
        device=group.device,
        start_step=start_step,
        bad_samples=Path(config.run.dir) / parts.rank_file_name("bad_samples", group),
        listen=lambda report: emit(listeners, report),
    )


def _build_trainer(
    config: PretrainConfig,
    rank: RankContext,
    state: PretrainState,
    checkpoints: CheckpointManager,
    snapshot: Snapshot | None,
    loader: TubeletLoader,
    evaluate: Evaluate,
    listeners: Sequence[Listener],
) -> PretrainTrainer:
    objective = Objective(
        state.network,
        temperature=config.objective.temperature,
        autocast=_autocasts(config),
        alignment_layer=config.objective.alignment_layer,
    )
    timeout = config.supervise.collective_seconds
    return PretrainTrainer(
        engine=parts.build_engine(objective, config.optimizer, config.train, rank.group, snapshot, timeout),
        state=state,
        group=rank.group,
        schedule=parts.build_schedule(config.train, config.optimizer, loader.steps_per_epoch),
        losses=config.objective,
        checkpoints=checkpoints,
        checkpoint_every=config.checkpoint.every,
        run_config=asdict(config),
        batches=parts.rank_batches(loader, rank.group),
        config=config.train,
        listeners=listeners,
        start=snapshot.step if snapshot else 0,
        progress=snapshot.progress if snapshot else Progress(),
        name_of=loader.name_of,
        stop=rank.stop,
        heartbeat=rank.heartbeat,
        flops_per_video=flops_per_video(config.encoder, config.heads, config.data.frames, config.data.crop),
        evaluate=evaluate,
        evaluate_every=config.evaluate.every,
    )


def _autocasts(config: PretrainConfig) -> bool:
    return config.train.precision == "bfloat16"


def _weights_message(file: str, random_names: Sequence[str]) -> str:
    """Name the weights file, and the parts of the network that it leaves at random values."""
    parts = dict.fromkeys(name.partition(".")[0] for name in random_names)
    return f"initial weights from {file}; random: {', '.join(parts) or 'none'}"
