"""DeepSpeed: process group, optimizer, ZeRO, and optimizer state for checkpoints.

Checkpoints hold the optimizer state in full and by parameter name, so that any number of ranks can load it.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import distributed, nn

from mcl_dist.config import choice, number
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.model.network import LossModule
from mcl_dist.training.lars import LARS

STATE_KEYS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq"), "lars": ("momentum_buffer",)}
ADAMW_BETAS = (0.9, 0.999)
PERSISTENT_NUMEL = 100_000  # stage 3 keeps smaller parameters whole on every rank: gathering them costs more
ONE_GROUP = 10**15  # elements: stage 3 steps all parameters in one group, so that one norm decides for all


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and its sharding; the defaults are METHOD.md's, section 5, for Kinetics.

    Attributes:
        learning_rate: at the end of the warm-up.
        scale_with_batch: global batch that `learning_rate` is meant for; for another global batch the rate scales in
            proportion. None disables the scaling.
        momentum: of SGD and LARS; AdamW uses 0.9 and 0.999.
        weight_decay: of every parameter; LARS exempts biases and BatchNorm.
        warmup_epochs: of the learning rate, and of the doubled alignment loss.
        zero_stage: 0 replicates the optimizer state, 1 shards it, 2 also shards the gradients, 3 also the parameters.
    """

    name: str = choice("sgd", "adamw", "lars")
    learning_rate: float = number(0.02, minimum=0)
    scale_with_batch: int | None = number(None, minimum=1)
    momentum: float = number(0.9, minimum=0, maximum=1)
    weight_decay: float = number(1e-4, minimum=0)
    warmup_epochs: float = number(5.0, minimum=0)
    zero_stage: int = number(1, minimum=0, maximum=3)

    def base_rate(self, global_batch: int) -> float:
        """Learning rate at the end of the warm-up for a global batch of `global_batch` videos."""
        return self.learning_rate * (global_batch / self.scale_with_batch if self.scale_with_batch else 1.0)

    def check(self) -> None:
        """Check the combination of fields.

        Raises:
            ConfigError: LARS with ZeRO, whose flat shards have no boundaries between parameters.
        """
        if self.name == "lars" and self.zero_stage:
            raise ConfigError(
                f"optimizer.zero_stage: found {self.zero_stage}, must be 0 with optimizer.name=lars, "
                "which needs each parameter whole"
            )


def pick_device() -> torch.device:
    """This rank's GPU if there is one, else the CPU; selects DeepSpeed's accelerator accordingly."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    cores_per_rank = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))
    # OMP_NUM_THREADS, which sets torch.get_num_threads, stays the upper limit.
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores_per_rank)))
    return torch.device("cpu")


def join_process_group(device: torch.device) -> None:
    """Join the process group of the launcher's ranks: NCCL between GPUs, gloo between CPUs."""
    deepspeed = _deepspeed()
    if device.type == "cpu":
        # Its shared-memory collectives compile for 18 s at first use and gain nothing at this size.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)


class Update(NamedTuple):
    """Result of a step, on the device and equal on all ranks.

    Attributes:
        taken: 1.0, or 0.0 for a step without a finite loss and gradient, which changed nothing.
        gradient_norm: of all parameters together.
    """

    taken: torch.Tensor
    gradient_norm: torch.Tensor


class Engine:
    """Forward, backward and step of an objective under DeepSpeed, which optimises its network's parameters.

    A rank's `batch_per_rank` videos of a step are split into `accumulate` parts, each with a forward and a backward.
    """

    def __init__(
        self, objective: LossModule, config: OptimizerConfig, *, batch_per_rank: int, accumulate: int = 1
    ) -> None:
        config.check()
        self.objective = objective
        self._state_keys = STATE_KEYS[config.name] if config.name == "adamw" or config.momentum else ()
        self._stage = config.zero_stage
        self._group = ProcessGroup()
        self._torch_optimizer = make_optimizer(objective, config)
        self._torch_optimizer.register_step_pre_hook(self._check_finite)
        self._engine, *_ = _deepspeed().initialize(
            model=objective,
            optimizer=self._torch_optimizer,
            config=_deepspeed_config(config.zero_stage, batch_per_rank, accumulate),
        )
        self._has_uncounted_part = False
        self._loss_is_finite: torch.Tensor
        self._update: Update
        self._create_optimizer_state()

    def forward(self, *inputs: Any) -> torch.Tensor:
        """The objective's loss."""
        loss: torch.Tensor = self._engine(*inputs)
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one part of the step's videos."""
        if self._has_uncounted_part:
            self._engine.step()  # before the last part, this only counts parts
        self._engine.backward(loss)
        self._has_uncounted_part = True

    def step(self, loss: torch.Tensor, learning_rate: float) -> Update:
        """Update the parameters after the last `backward`; change nothing if loss or gradient are not finite.

        The device decides; the host does not wait.
        `loss` is the mean over ranks and parts, the same on all ranks.
        """
        for group in self._torch_optimizer.param_groups:
            group["lr"] = learning_rate
        self._loss_is_finite = torch.isfinite(loss)
        # Stage 3 checks the gradient too, and does not call the optimizer if it is not finite: then this remains.
        self._update = Update(torch.zeros_like(loss), torch.full_like(loss, torch.inf))
        self._engine.step()
        self._has_uncounted_part = False
        return self._update

    @torch.no_grad()
    def _check_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Decide whether the step is taken: a hook before the optimizer's step, after all gradients are reduced."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
        if self._stage and distributed.is_initialized():
            distributed.all_reduce(squares)  # each rank holds its shard of the gradient
        self._update = Update((self._loss_is_finite & torch.isfinite(squares)).float(), squares.sqrt())
        optimizer.found_inf = 1 - self._update.taken  # type: ignore[attr-defined]  # fused optimizers skip on 1

    @property
    def shards_parameters(self) -> bool:
        """Whether parameters are whole only within `gathered`."""
        return self._stage == 3

    @contextmanager
    def gathered(self, *, modify: bool = False) -> Iterator[None]:
        """Context in which the network's parameters are whole; all ranks must enter together.

        With `modify` the caller writes parameters, equal on all ranks, and the optimizer's copies are refreshed.
        """
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        # Without a modifier rank, stage 3 silently discards writes.
        parameters, rank = list(self.objective.network.parameters()), 0 if modify else None
        with GatheredParameters(parameters, modifier_rank=rank, enabled=self.shards_parameters):
            yield
        if modify and self._stage:
            self._engine.optimizer.refresh_fp32_params()

    def optimizer_shard(self) -> dict[str, torch.Tensor]:
        """This rank's shard of the optimizer state, not copied; the shards of all ranks make up the whole.

        Names are `key/name@start`: flat values of a parameter's state from element `start` on. The first rank's shard
        of AdamW also has `step@0`, the number of steps taken.
        """
        shard = {}
        for name, start, state, own in self._local_pieces():
            for key in self._state_keys:
                shard[f"{key}/{name}@{start}"] = state[key].detach().flatten()[own]
        if self._counts_steps and self._group.is_first:
            shard["step@0"] = self._torch_optimizer.state[self._optimized_tensors()[0]]["step"].reshape(1)
        return shard

    def _local_pieces(self) -> Iterator[tuple[str, int, dict[str, torch.Tensor], slice]]:
        """Pieces of parameters' state in this rank's shard: name, first element, optimizer state, and slice of it."""
        states = self._torch_optimizer.state
        if not self._stage:  # every rank holds all: each saves every n-th parameter
            for index, (name, parameter) in enumerate(self._named_parameters()):
                if index % self._group.size == self._group.rank:
                    yield name, 0, states[parameter], slice(None)
            return
        for group, shard in self._shards():
            for name, parameter in group:
                to, start, size = self._locate(parameter)
                if size > 0:
                    yield name, start, states[shard], slice(to, to + size)

    def load_optimizer_state(self, state: dict[str, torch.Tensor], step: int) -> None:
        """Load a checkpoint's optimizer state: whole tensors by `key/name`, and the number of steps taken, else `step`.

        Raises:
            UserError: the state is of another optimizer.
        """
        names = [f"{key}/{name}" for key in self._state_keys for name, _ in self._named_parameters()]
        missing = next((name for name in names if name not in state), None)
        if missing is not None:
            raise UserError(
                f"the checkpoint of step {step} has no {missing}: set optimizer.name and optimizer.momentum as it "
                "has them, or choose another run.dir"
            )
        for key in self._state_keys:
            full = {name: state[f"{key}/{name}"] for name, _ in self._named_parameters()}
            for owner, value in self._scatter(full):
                self._torch_optimizer.state[owner][key].copy_(value)
        for owner in self._optimized_tensors():
            if self._counts_steps:
                self._torch_optimizer.state[owner]["step"].fill_(float(state.get("step", step)))

    @property
    def _counts_steps(self) -> bool:
        return "exp_avg" in self._state_keys

    def _create_optimizer_state(self) -> None:
        """Create the state that the optimizer's first step would create, so that it exists even if that is skipped."""
        for owner in self._optimized_tensors():
            state = self._torch_optimizer.state[owner]
            for key in self._state_keys:
                state[key] = torch.zeros_like(owner)
            if self._counts_steps:
                state["step"] = torch.zeros((), device=owner.device)

    def _optimized_tensors(self) -> list[torch.Tensor]:
        """The tensors that the optimizer updates: the parameters, or this rank's flat shards of them."""
        if not self._stage:
            return [parameter for _, parameter in self._named_parameters()]
        zero = self._engine.optimizer
        return list(zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups)

    def _scatter(self, full: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of a tensor that the optimizer updates and its part of `full`, which has whole tensors by name."""
        if not self._stage:
            yield from ((parameter, full[name].to(parameter)) for name, parameter in self._named_parameters())
            return
        for group, shard in self._shards():
            values = torch.zeros_like(shard)
            for name, parameter in group:
                to, source, size = self._locate(parameter)
                values[to : to + size] = full[name].flatten()[source : source + size].to(values)
            yield shard, values

    def _shards(self) -> Iterator[tuple[list[tuple[str, nn.Parameter]], torch.Tensor]]:
        """The groups of named parameters that ZeRO flattens, each with this rank's shard of it."""
        names = {id(parameter): name for name, parameter in self._named_parameters()}
        zero = self._engine.optimizer
        groups = zero.fp16_groups if self._stage == 3 else zero.bit16_groups
        for group, shard in zip(groups, self._optimized_tensors(), strict=True):
            yield [(names[id(parameter)], parameter) for parameter in group], shard

    def _locate(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """The part of a parameter in this rank's shard: (start in the shard, start in the parameter, size)."""
        if self._stage == 3:
            zero = self._engine.optimizer
            _, start, size = zero.grad_position[zero.get_param_id(parameter)]
            source = self._group.rank * size  # the last rank's piece may extend beyond the parameter
            return start, source, max(0, min(size, parameter.ds_numel - source))  # type: ignore[attr-defined]
        fragment = parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is None:  # no part of this parameter is in the shard
            return 0, 0, 0
        to, source = fragment.hp_fragment_address, fragment.lp_fragment_address
        return to.start, source.start, source.numel

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.objective.network.named_parameters()


def make_optimizer(module: nn.Module, config: OptimizerConfig, *, fused: bool = True) -> torch.optim.Optimizer:
    """The configured optimizer of a module's parameters.

    If `fused`, it updates all parameters in one kernel, which skips the step where `found_inf` is 1.
    """
    parameters, rate, decay = list(module.parameters()), config.learning_rate, config.weight_decay
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=ADAMW_BETAS, weight_decay=decay, fused=fused)
    if config.name == "lars":
        return LARS(parameters, lr=rate, momentum=config.momentum, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=config.momentum, weight_decay=decay, fused=fused)


def _deepspeed_config(zero_stage: int, batch_per_rank: int, accumulate: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # ours suffices, and does not wait for the device
    if zero_stage == 3:
        zero |= {"stage3_param_persistence_threshold": PERSISTENT_NUMEL, "sub_group_size": ONE_GROUP}
    return {
        "train_micro_batch_size_per_gpu": batch_per_rank // accumulate,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,  # DeepSpeed's default of 1.0 is not MCL's
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice per step
    }


def _deepspeed() -> Any:
    """Import DeepSpeed, after the accelerator is chosen, and silence its warnings and log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside DeepSpeed itself
        import deepspeed
    # DeepSpeed calls a function that PyTorch has renamed.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
