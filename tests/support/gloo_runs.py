"""Runs on batches of noise, for tests of the trainer on gloo ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from mcl_dist.batch import TubeletBatch
from mcl_dist.checkpoint import CheckpointConfig, CheckpointManager, Progress
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.objective.momentum_encoder import MomentumEncoder
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.objective.objective import Objective, ObjectiveConfig
from mcl_dist.objective.schedule import Schedule
from mcl_dist.training import deepspeed_engine as engine_module
from mcl_dist.training.config import TrainConfig
from mcl_dist.training.deepspeed_engine import Engine, OptimizerConfig, join_process_group, pick_device
from mcl_dist.training.pretrain_state import PretrainState
from mcl_dist.training.pretrain_step import PretrainTrainer

GLOBAL_BATCH, STEPS = 4, 6
IGNORE_SPIKES = TrainConfig(on_spike="ignore")
LOSSES = ObjectiveConfig(queue=30, order="ramp")


def noise(group: ProcessGroup, start: int) -> Iterator[TubeletBatch]:
    """Batches from step `start` on; the global batch depends only on the step."""
    for step in itertools.count(start):
        draw = torch.Generator().manual_seed(step)
        views = torch.randint(0, 256, (GLOBAL_BATCH, 4, 8, 32, 32, 3), generator=draw, dtype=torch.uint8)
        motion = torch.rand(GLOBAL_BATCH, 2, 4, 4, generator=draw)
        order = torch.randint(0, 2, (GLOBAL_BATCH,), generator=draw)
        size = GLOBAL_BATCH // group.size
        own = slice(group.rank * size, (group.rank + 1) * size)
        samples, boxes = torch.arange(GLOBAL_BATCH), torch.zeros(GLOBAL_BATCH, 4, 4)
        yield TubeletBatch(
            views=views[own], motion=motion[own], order=order[own], samples=samples[own], boxes=boxes[own]
        )


def build_trainer(
    folder: str | Path,
    group: ProcessGroup,
    optimizer: OptimizerConfig,
    batches: Callable[[int], Iterator[TubeletBatch]],
    trainer: type[PretrainTrainer] = PretrainTrainer,
    config: TrainConfig = IGNORE_SPIKES,
    steps: int = STEPS,
    batch_norm: str = "shuffled",
) -> PretrainTrainer:
    """A trainer that resumes from the newest checkpoint in the folder, if there is one."""
    engine_module.PERSISTENT_NUMEL = 0  # stage 3 shards even the smallest parameter
    torch.manual_seed(0)
    network = Network(EncoderConfig(width=4, blocks=(1, 1), batch_norm=batch_norm), HeadsConfig(dim=8)).train()
    momentum = MomentumEncoder(network, group, seed=0, autocast=False)
    queue = NegativeQueue.random(
        LOSSES.queue, 8, torch.Generator().manual_seed(0), group.device, group=group, sharded=True
    )
    state = PretrainState(network, momentum, queue)
    checkpoints = CheckpointManager(f"{folder}/checkpoints", group, CheckpointConfig(keep=99))
    start, _ = checkpoints.latest()
    snapshot = checkpoints.load(start) if start else None
    if snapshot:
        state.restore(snapshot, str(folder))
    engine = Engine(
        Objective(network, temperature=0.1),
        optimizer,
        batch_per_rank=GLOBAL_BATCH // group.size,
        accumulate=config.accumulate,
    )
    if snapshot:
        engine.load_optimizer_state(snapshot.optimizer, snapshot.step)
    return trainer(
        engine=engine,
        state=state,
        group=group,
        schedule=Schedule(optimizer.learning_rate, steps_per_epoch=2, total_steps=steps, warmup_epochs=1.0),
        losses=LOSSES,
        checkpoints=checkpoints,
        checkpoint_every=3,
        run_config={},
        batches=batches(start or 0),
        config=config,
        listeners=[],
        start=start or 0,
        progress=snapshot.progress if snapshot else Progress(),
    )


def join_ranks() -> ProcessGroup:
    device = pick_device()
    join_process_group(device)
    return ProcessGroup(device)
