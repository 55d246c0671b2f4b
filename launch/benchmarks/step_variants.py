"""Variants of the training step for `mcl bench step`, from the reference to the step of `mcl pretrain`."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from launch.benchmarks import reference_step
from launch.run.config import PretrainConfig, check
from launch.supervision.deepspeed_launcher import free_port
from mcl_dist.batch import FIRST_KEY, NUM_VIEWS, QUERY, TubeletBatch
from mcl_dist.checkpoint import CheckpointManager
from mcl_dist.config import load_config
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.events import Listener
from mcl_dist.model.encoder import normalise
from mcl_dist.model.network import Network
from mcl_dist.objective.alignment import align, alignment_map, similarity_gradient
from mcl_dist.objective.losses import inter_loss, intra_loss, key_similarities, order_loss
from mcl_dist.objective.momentum_encoder import NUM_KEYS, MomentumEncoder
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.objective.objective import Objective
from mcl_dist.objective.schedule import Schedule
from mcl_dist.training.deepspeed_engine import Engine, join_process_group, make_optimizer
from mcl_dist.training.phase_timer import PhaseTimer
from mcl_dist.training.pretrain_state import PretrainState
from mcl_dist.training.pretrain_step import PretrainTrainer

Mark = Callable[[str], None]  # called with the name of a phase at its end


@dataclass(frozen=True)
class StepVariant:
    """The optimisations of a variant over the reference."""

    name: str
    closed_form: bool = False
    one_pass: bool = False
    fused: bool = False
    channels_last: bool = False
    bfloat16: bool = False
    compiled: bool = False
    trainer: bool = False


def step_variants(config: PretrainConfig, device: torch.device) -> list[StepVariant]:
    """The reference, then variants that each add one optimisation; a CPU gets those for GPUs only if configured."""
    is_gpu = device.type == "cuda"
    changes = ["closed_form", "one_pass", "fused", "channels_last"]
    changes += ["bfloat16"] if is_gpu or config.train.precision == "bfloat16" else []
    changes += ["compiled"] if is_gpu or config.train.compile else []
    variants = [StepVariant("plain")]
    for change in [*changes, "trainer"]:
        variants.append(StepVariant(**{**asdict(variants[-1]), "name": change, change: True}))
    return variants


class StandaloneStep:
    """A step without DeepSpeed and trainer; each part is the reference or the optimised implementation."""

    def __init__(self, config: PretrainConfig, variant: StepVariant, device: torch.device) -> None:
        self._variant, self._device, self._losses = variant, device, config.objective
        state = _state(config, variant, device)
        self._network, self._momentum, self._queue = state.network, state.momentum, state.queue
        self._optimizer = make_optimizer(self._network, config.optimizer, fused=variant.fused)
        self.loss = torch.zeros((), device=device)  # of the last step

    def __call__(self, batch: TubeletBatch, mark: Mark) -> None:
        """Take a step on a batch that lies in host memory."""
        batch = batch.to(self._device)
        mark("copy")
        keys = self._encode(batch.views)
        mark("keys")
        loss = self._loss(batch, keys)
        mark("forward")
        loss.backward()  # type: ignore[no-untyped-call]
        mark("backward")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.loss = loss.detach()
        mark("optimizer")
        if self._variant.fused:
            self._momentum.update(self._network.parameters(), self._losses.momentum)
        else:
            reference_step.update_average(self._momentum.network, self._network, self._losses.momentum)
        mark("momentum")
        if self._variant.fused:
            self._queue.enqueue(keys[0])
        else:
            self._queue.position = reference_step.enqueue(self._queue.vectors, self._queue.position, keys[0])
        mark("queue")

    @torch.no_grad()
    def _encode(self, views: torch.Tensor) -> torch.Tensor:
        """Inter, intra and order vectors of the three keys: (heads, keys, B, d)."""
        keys = []
        for key in range(FIRST_KEY, FIRST_KEY + NUM_KEYS):
            with self._autocast():
                output = self._momentum.network(self._clips(views[:, key]))
            keys.append(torch.stack([output.inter.vector, output.intra.vector, output.order.vector]))
        return torch.stack(keys, dim=1)

    def _loss(self, batch: TubeletBatch, keys: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            output = self._network(self._clips(batch.views[:, QUERY]))
        inter_keys, intra_keys, order_keys = keys
        query, temperature = output.inter.vector, self._losses.temperature
        if self._variant.one_pass:
            negatives = self._queue.log_sum_exp(query, temperature)
            inter = inter_loss(key_similarities(query, inter_keys), negatives, temperature)
        else:
            inter = reference_step.inter_loss(query, inter_keys, self._queue.vectors, temperature)
        intra = intra_loss(key_similarities(output.intra.vector, intra_keys), temperature)
        gradient = (
            similarity_gradient(self._network, output, inter_keys[0])
            if self._variant.closed_form
            else reference_step.similarity_gradient(output, inter_keys[0])
        )
        aligned = align(alignment_map(gradient.float()), batch.motion)
        second, third = order_keys[1:]
        order = order_loss(self._network.order_classifier, output.order.vector, second, third, batch.order)
        return inter + self._losses.intra * intra + self._losses.alignment * aligned.loss + 0.0 * order

    def _clips(self, clips: torch.Tensor) -> torch.Tensor:
        """Normalised clips; the optimised variant keeps the bytes' memory order, channels last."""
        return normalise(clips) if self._variant.channels_last else reference_step.normalised(clips)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._variant.bfloat16)


class TrainerStep:
    """The step of `mcl pretrain` on a single rank, with a mark at the end of each phase; listeners get its events."""

    def __init__(
        self, config: PretrainConfig, variant: StepVariant, device: torch.device, listeners: Sequence[Listener] = ()
    ) -> None:
        self._device = device
        checkpoints = CheckpointManager(tempfile.gettempdir(), ProcessGroup(device))  # it writes none
        trainer = self._trainer = single_rank_trainer(config, variant, device, checkpoints, listeners)
        self._mark: Mark = lambda _: None
        for owner, method, phase in (
            (trainer.state.momentum, "encode", "keys"),
            (trainer.engine, "forward", "forward"),
            (trainer.engine, "backward", "backward"),
            (trainer.engine, "step", "optimizer"),
            (trainer.state.momentum, "update", "momentum"),
            (trainer.state.queue, "enqueue", "queue"),
        ):
            self._mark_phase(owner, method, phase)
        self._step = 0

    @property
    def loss(self) -> torch.Tensor:
        """Of the last step."""
        return self._trainer.engine.objective.report["loss"]

    def __call__(self, batch: TubeletBatch, mark: Mark) -> None:
        """Take a step on a batch that lies in host memory."""
        self._mark = mark
        batch = batch.to(self._device)
        mark("copy")
        self._trainer.train_step(self._step, batch, PhaseTimer(self._device), waited=0.0).seconds = 1.0
        self._step += 1

    def _mark_phase(self, owner: object, method: str, phase: str) -> None:
        """Make the method mark its own time as `phase`, and the time before it as `other`."""
        original = getattr(owner, method)

        @wraps(original)
        def marking(*arguments: Any, **options: Any) -> Any:
            self._mark("other")
            result = original(*arguments, **options)
            self._mark(phase)
            return result

        setattr(owner, method, marking)


def single_rank_trainer(
    config: PretrainConfig,
    variant: StepVariant,
    device: torch.device,
    checkpoints: CheckpointManager,
    listeners: Sequence[Listener] = (),
) -> PretrainTrainer:
    """A trainer in a process group of one rank; the caller passes batches to `train_step`."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    join_process_group(device)
    state = _state(config, variant, device)
    engine = Engine(
        Objective(state.network, temperature=config.objective.temperature, autocast=variant.bfloat16),
        config.optimizer,
        batch_per_rank=config.train.global_batch,
        accumulate=config.train.accumulate,
    )
    return PretrainTrainer(
        engine=engine,
        state=state,
        group=ProcessGroup(device),
        schedule=Schedule(config.optimizer.learning_rate, 1000, 1000, warmup_epochs=0.0),
        losses=replace(config.objective, order="none"),
        checkpoints=checkpoints,
        checkpoint_every=1000,
        run_config=asdict(config),
        batches=iter(()),
        config=config.train,
        listeners=listeners,
    )


def noise_config(path: str | Path, overrides: Sequence[str]) -> PretrainConfig:
    """A run's configuration for steps on noise, which read no video and write no folder; ConfigError if invalid."""
    config = load_config(PretrainConfig, path, ["data.train=none", "run.dir=none", *overrides])
    check(config, num_ranks=1)
    return config


def noise(config: PretrainConfig, device: torch.device) -> TubeletBatch:
    """A global batch of noise in host memory, pinned for a GPU."""
    draws = torch.Generator().manual_seed(config.run.seed)
    size, data = config.train.global_batch, config.data
    shape = (size, NUM_VIEWS, data.frames, data.crop, data.crop, 3)
    batch = TubeletBatch(
        views=torch.randint(0, 256, shape, dtype=torch.uint8, generator=draws),
        motion=torch.rand(size, *config.encoder.grid(data.frames, data.crop), generator=draws),
        order=torch.randint(0, 2, (size,), generator=draws),
        samples=torch.arange(size),
        boxes=torch.zeros(size, NUM_VIEWS, 4),
    )
    return batch.pinned() if device.type == "cuda" else batch


def _state(config: PretrainConfig, variant: StepVariant, device: torch.device) -> PretrainState:
    torch.manual_seed(config.run.seed)
    network = Network(config.encoder, config.heads)
    network.to(device).train()
    momentum = MomentumEncoder(network, ProcessGroup(device), seed=config.run.seed, autocast=variant.bfloat16)
    draws = torch.Generator().manual_seed(config.run.seed)
    queue = NegativeQueue.random(config.objective.queue, config.heads.dim, draws, device)
    state = PretrainState(network, momentum, queue)
    if variant.compiled:
        state.compile()
    return state
