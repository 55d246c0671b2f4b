"""How long training stands still for a checkpoint: written while it waits, and written in the background."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch

from launch.settings import PretrainConfig
from mcl_dist.checkpoint import CheckpointConfig, Checkpoints
from mcl_dist.engine import make_optimizer
from mcl_dist.heads import Network
from mcl_dist.learner import Learner
from mcl_dist.momentum import MomentumEncoder
from mcl_dist.negatives import Queue
from mcl_dist.ranks import Ranks


@dataclass(frozen=True)
class CheckpointResult:
    """What a checkpoint costs, one rank alone.

    Attributes:
        bytes: of its files.
        synchronous_seconds: that training stands still when it waits until all is written and synced; median.
        stall_seconds: that it stands still when a thread writes; median.
        stall_ratio: of the two; the largest over rounds is `worst_stall_ratio`.
        background_seconds: until a checkpoint in the background is complete while training goes on; median.
        step_seconds: of a step with no checkpoint being written; median.
        step_seconds_beside: of a step while one is; median.
    """

    bytes: int
    synchronous_seconds: float
    stall_seconds: float
    stall_ratio: float
    worst_stall_ratio: float
    background_seconds: float
    step_seconds: float
    step_seconds_beside: float


def benchmark(config: PretrainConfig, folder: str | None, rounds: int, say: Callable[[str], None]) -> CheckpointResult:
    """Save in both ways by turns, after a first save that counts for neither.

    Args:
        config: whose networks, queue and optimizer are saved.
        folder: URL to save to; none is a temporary folder.
        rounds: saves of each kind.
        say: is told of each.

    Raises:
        UserError: when the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="mcl-bench-") as temporary:
        return _Bench(config, folder or temporary).run(rounds, say)


class _Bench:
    def __init__(self, config: PretrainConfig, folder: str) -> None:
        torch.manual_seed(config.run.seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = Network(config.encoder, config.heads).to(device).train()
        momentum = MomentumEncoder(network, Ranks(device), seed=0, autocast=False)
        draws = torch.Generator().manual_seed(config.run.seed)
        queue = Queue.random(config.objective.queue, config.heads.dim, draws, device)
        self._learner = Learner(network, momentum, queue)
        self._optimizer = make_optimizer(network, config.optimizer)
        self._clips = torch.zeros(2, 3, config.data.frames, 32, 32, device=device)
        settings = replace(config.checkpoint, keep=1, keep_every=None)
        self._checkpoints = Checkpoints(folder, Ranks(device), CheckpointConfig(**asdict(settings)))
        self._config = asdict(config)
        self._device = device
        self._saves = 0

    def run(self, rounds: int, say: Callable[[str], None]) -> CheckpointResult:
        self._step()
        self._save(wait=True)  # makes the host memory, as a run does at its start
        alone = [self._step() for _ in range(rounds)]
        waited, stalls, behind, beside = [], [], [], []
        for number in range(1, rounds + 1):
            waited.append(self._save(wait=True))
            start = time.perf_counter()
            stalls.append(self._save(wait=False))
            while self._checkpoints.is_writing:
                beside.append(self._step())
            behind.append(time.perf_counter() - start)
            self._checkpoints.finish()
            say(f"round {number}: {waited[-1]:.2f} s when waiting, {stalls[-1]:.3f} s in the background")
        (*_, written) = self._checkpoints.news()
        return CheckpointResult(
            bytes=getattr(written, "bytes", 0),
            synchronous_seconds=median(waited),
            stall_seconds=median(stalls),
            stall_ratio=median(stalls) / median(waited),
            worst_stall_ratio=max(stall / wait for stall, wait in zip(stalls, waited, strict=True)),
            background_seconds=median(behind),
            step_seconds=median(alone),
            step_seconds_beside=median(beside),
        )

    def _save(self, *, wait: bool) -> float:
        self._saves += 1
        since = time.perf_counter()
        self._checkpoints.begin(self._learner.share(self._saves, self._momentum(), self._config), since)
        if wait:
            self._checkpoints.finish()
        return time.perf_counter() - since

    def _momentum(self) -> dict[str, torch.Tensor]:
        return {
            f"{key}/{name}@0": self._optimizer.state[parameter][key].flatten()
            for name, parameter in self._learner.network.named_parameters()
            for key in self._optimizer.state[parameter]
        }

    def _step(self) -> float:
        """Forward, backward, update of small clips; seconds. All parameters change, as in training."""
        start = time.perf_counter()
        output = self._learner.network(self._clips.normal_())
        (output.inter.vector.square().sum() + output.intra.vector.sum() + output.order.vector.sum()).backward()
        for parameter in self._learner.network.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._learner.momentum.update(self._learner.network.parameters(), 0.999)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
