"""DeepSpeed around what is to be learnt: process group, optimizer, ZeRO, and optimizer state in and out.

The optimizer's state travels by parameter name and in full, so that any number of ranks can load it.
"""

from __future__ import annotations

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
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.model.loss_module import LossModule
from mcl_dist.training.lars import LARS

STATE_KEYS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq"), "lars": ("momentum_buffer",)}
ADAMW_BETAS = (0.9, 0.999)
PERSISTENT_NUMEL = 100_000  # of a parameter that stage 3 keeps whole on every rank: gathering it costs more
ONE_GROUP = 10**15  # elements: stage 3 steps all parameters at once, so that one norm decides for all


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become steps; the defaults are METHOD.md's, section 5, for Kinetics.

    Attributes:
        name: `sgd`, `adamw` or `lars`.
        learning_rate: at the end of the warm-up, for the configured global batch.
        scale_with_batch: global batch that `learning_rate` is meant for; for another it grows and shrinks in
            proportion. None takes it as it is.
        momentum: of SGD and LARS; AdamW has its usual 0.9 and 0.999.
        weight_decay: on every parameter; LARS spares biases and BatchNorm.
        warmup_epochs: of the learning rate, and of the doubled alignment loss.
        zero_stage: 0 replicates the optimizer's state, 1 shards it, 2 shards gradients too, 3 the parameters too.
    """

    name: str = choice("sgd", "adamw", "lars")
    learning_rate: float = number(0.02, minimum=0)
    scale_with_batch: int | None = number(None, minimum=1)
    momentum: float = number(0.9, minimum=0, maximum=1)
    weight_decay: float = number(1e-4, minimum=0)
    warmup_epochs: float = number(5.0, minimum=0)
    zero_stage: int = number(1, minimum=0, maximum=3)

    def base_rate(self, global_batch: int) -> float:
        """Learning rate at the end of the warm-up for a global batch of that many videos."""
        return self.learning_rate * (global_batch / self.scale_with_batch if self.scale_with_batch else 1.0)

    def check(self) -> None:
        """What no field can check alone.

        Raises:
            ConfigError: LARS under ZeRO, whose shards hide where one parameter ends and the next begins.
        """
        if self.name == "lars" and self.zero_stage:
            raise ConfigError(
                f"optimizer.zero_stage: found {self.zero_stage}, must be 0 with optimizer.name=lars, "
                "which needs each parameter whole"
            )


def pick_device() -> torch.device:
    """This rank's GPU where there is one, else the CPU; also tells DeepSpeed which."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))
    # As many as OMP_NUM_THREADS asks for, where it does.
    torch.set_num_threads(max(1, min(torch.get_num_threads(), share)))
    return torch.device("cpu")


def join_process_group(device: torch.device) -> None:
    """Meet the other ranks that the launcher started: NCCL between GPUs, gloo between CPUs."""
    deepspeed = _deepspeed()
    if device.type == "cpu":
        # Its shared-memory collectives compile for 18 s at first use and win nothing at this size.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)


class Update(NamedTuple):
    """What became of a step, on the device and the same on all ranks.

    Attributes:
        taken: 1.0, or 0.0 where loss or gradient were not finite and nothing was changed.
        gradient_norm: of all parameters together.
    """

    taken: torch.Tensor
    gradient_norm: torch.Tensor


class Engine:
    """Forward, backward and step of an objective under DeepSpeed.

    Args:
        objective: whose network's parameters are stepped.
        config: how.
        batch_per_rank: videos that a rank's step takes.
        accumulate: parts that they come in, each with a forward and a backward of its own.
    """

    def __init__(
        self, objective: LossModule, config: OptimizerConfig, *, batch_per_rank: int, accumulate: int = 1
    ) -> None:
        config.check()
        self.objective = objective
        self._state_keys = STATE_KEYS[config.name] if config.name == "adamw" or config.momentum else ()
        self._stage = config.zero_stage
        together = distributed.is_initialized()
        self._rank = distributed.get_rank() if together else 0
        self._num_ranks = distributed.get_world_size() if together else 1
        self._torch_optimizer = make_optimizer(objective, config)
        self._torch_optimizer.register_step_pre_hook(self._judge)
        zero: dict[str, Any] = {"stage": config.zero_stage}
        if config.zero_stage in (1, 2):
            zero["compute_grad_norm"] = False  # ours is enough, and waits for no device
        if config.zero_stage == 3:
            zero |= {"stage3_param_persistence_threshold": PERSISTENT_NUMEL, "sub_group_size": ONE_GROUP}
        self._engine, *_ = _deepspeed().initialize(
            model=objective,
            optimizer=self._torch_optimizer,
            config={
                "train_micro_batch_size_per_gpu": batch_per_rank // accumulate,
                "gradient_accumulation_steps": accumulate,
                "gradient_clipping": 0.0,  # DeepSpeed's default of 1.0 is not MCL's
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
            },
        )
        self._is_behind = False
        self._loss_is_finite: torch.Tensor
        self._update: Update
        self._create_state()

    def forward(self, *inputs: Any) -> torch.Tensor:
        """The objective's scalar."""
        loss: torch.Tensor = self._engine(*inputs)
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one part of the step's videos."""
        if self._is_behind:
            self._engine.step()  # of a part but the last, this only counts it
        self._engine.backward(loss)
        self._is_behind = True

    def step(self, loss: torch.Tensor, learning_rate: float) -> Update:
        """Update the parameters after the last `backward`, or nothing where loss or gradient are not finite.

        The decision falls on the device: no rank waits for it here.

        Args:
            loss: mean over ranks and parts, the same on all ranks.
            learning_rate: of this step.
        """
        for group in self._torch_optimizer.param_groups:
            group["lr"] = learning_rate
        self._loss_is_finite = torch.isfinite(loss)
        # Stage 3 looks for itself, and does not ask the optimizer where it finds no finite gradient.
        self._update = Update(torch.zeros_like(loss), torch.full_like(loss, torch.inf))
        self._engine.step()
        self._is_behind = False
        return self._update

    @torch.no_grad()
    def _judge(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before the optimizer's step, when all gradients are reduced: is it to be taken?"""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
        if self._stage and distributed.is_initialized():
            distributed.all_reduce(squares)  # each rank holds its shard of the gradient
        self._update = Update((self._loss_is_finite & torch.isfinite(squares)).float(), squares.sqrt())
        optimizer.found_inf = 1 - self._update.taken  # type: ignore[attr-defined]  # what fused optimizers heed

    @property
    def shards_parameters(self) -> bool:
        """Whether parameters are whole within `gathered` alone."""
        return self._stage == 3

    @contextmanager
    def gathered(self, *, changing: bool = False) -> Iterator[None]:
        """Within, the network's parameters are whole; all ranks must enter together.

        Args:
            changing: parameters are written, with the same values on all ranks, and the optimizer has to know.
        """
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        # Without a modifier rank, what is written at stage 3 is silently lost.
        with GatheredParameters(
            list(self.objective.network.parameters()),
            modifier_rank=0 if changing else None,
            enabled=self.shards_parameters,
        ):
            yield
        if changing and self._stage:
            self._engine.optimizer.refresh_fp32_params()

    def optimizer_share(self) -> dict[str, torch.Tensor]:
        """This rank's part of the optimizer's state, not copied; the parts of all ranks are the whole.

        Each is `key/name@start`: values of a parameter's state, flat, from that one on. AdamW's first part also has
        `step@0`, the number of steps taken.
        """
        share = {}
        for name, start, state, own in self._own_pieces():
            for key in self._state_keys:
                share[f"{key}/{name}@{start}"] = state[key].detach().flatten()[own]
        if self._counts_steps and self._rank == 0:
            share["step@0"] = self._torch_optimizer.state[self._owners()[0]]["step"].reshape(1)
        return share

    def _own_pieces(self) -> Iterator[tuple[str, int, dict[str, torch.Tensor], slice]]:
        """What this rank has to give of parameters' state: name, first element, a state that holds it, and where."""
        states = self._torch_optimizer.state
        if not self._stage:  # every rank has all: they take turns
            for index, (name, parameter) in enumerate(self._named_parameters()):
                if index % self._num_ranks == self._rank:
                    yield name, 0, states[parameter], slice(None)
            return
        for group, shard in self._shards():
            for name, parameter in group:
                to, start, size = self._place(parameter)
                if size > 0:
                    yield name, start, states[shard], slice(to, to + size)

    def load_optimizer_state(self, state: dict[str, torch.Tensor], step: int) -> None:
        """Take over the whole, `key/name`, that the ranks' shares make.

        `step` is that of their checkpoint, for states that do not tell how many steps were taken.

        Raises:
            UserError: another optimizer made it.
        """
        names = [f"{key}/{name}" for key in self._state_keys for name, _ in self._named_parameters()]
        missing = next((name for name in names if name not in state), None)
        if missing is not None:
            raise UserError(
                f"the checkpoint of step {step} has no {missing}: set optimizer.name and optimizer.momentum to what it "
                "was made with, or start another run in another run.dir"
            )
        for key in self._state_keys:
            full = {name: state[f"{key}/{name}"] for name, _ in self._named_parameters()}
            for owner, value in self._scattered(full):
                self._torch_optimizer.state[owner][key].copy_(value)
        for owner in self._owners():
            if self._counts_steps:
                self._torch_optimizer.state[owner]["step"].fill_(float(state.get("step", step)))

    @property
    def _counts_steps(self) -> bool:
        return "exp_avg" in self._state_keys

    def _create_state(self) -> None:
        """Zeros, as the optimizer's first step would make: a first step that is skipped leaves them."""
        for owner in self._owners():
            state = self._torch_optimizer.state[owner]
            for key in self._state_keys:
                state[key] = torch.zeros_like(owner)
            if self._counts_steps:
                state["step"] = torch.zeros((), device=owner.device)

    def _owners(self) -> list[torch.Tensor]:
        """What the optimizer steps: the parameters, or this rank's flat shards of them."""
        if not self._stage:
            return [parameter for _, parameter in self._named_parameters()]
        zero = self._engine.optimizer
        return list(zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups)

    def _scattered(self, full: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of what the optimizer steps (a parameter, or this rank's flat shard) and its state's values."""
        if not self._stage:
            yield from ((parameter, full[name].to(parameter)) for name, parameter in self._named_parameters())
            return
        for group, shard in self._shards():
            values = torch.zeros_like(shard)
            for name, parameter in group:
                to, source, size = self._place(parameter)
                values[to : to + size] = full[name].flatten()[source : source + size].to(values)
            yield shard, values

    def _shards(self) -> Iterator[tuple[list[tuple[str, nn.Parameter]], torch.Tensor]]:
        """The groups of named parameters that ZeRO lays out flat, each with this rank's shard of it."""
        names = {id(parameter): name for name, parameter in self._named_parameters()}
        zero = self._engine.optimizer
        groups = zero.fp16_groups if self._stage == 3 else zero.bit16_groups
        for group, shard in zip(groups, self._owners(), strict=True):
            yield [(names[id(parameter)], parameter) for parameter in group], shard

    def _place(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """Where this rank's shard holds a part of a parameter: (start in the shard, start in the parameter, size)."""
        if self._stage == 3:
            zero = self._engine.optimizer
            _, start, size = zero.grad_position[zero.get_param_id(parameter)]
            source = self._rank * size  # the last rank's piece may reach beyond the parameter
            return start, source, max(0, min(size, parameter.ds_numel - source))  # type: ignore[attr-defined]
        fragment = parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is None:  # the shard holds nothing of this parameter
            return 0, 0, 0
        to, source = fragment.hp_fragment_address, fragment.lp_fragment_address
        return to.start, source.start, source.numel

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.objective.network.named_parameters()


def make_optimizer(module: nn.Module, config: OptimizerConfig, *, fused: bool = True) -> torch.optim.Optimizer:
    """The configured optimizer of a module's parameters.

    Args:
        module: what it steps.
        config: which, and its numbers.
        fused: all parameters in one kernel, which leaves them alone where `found_inf` says so.
    """
    parameters, rate, decay = list(module.parameters()), config.learning_rate, config.weight_decay
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=ADAMW_BETAS, weight_decay=decay, fused=fused)
    if config.name == "lars":
        return LARS(parameters, lr=rate, momentum=config.momentum, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=config.momentum, weight_decay=decay, fused=fused)


def _deepspeed() -> Any:
    """DeepSpeed, imported once the accelerator is chosen, its own talk kept to errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside DeepSpeed that nobody here can act on
        import deepspeed
    # It gathers through a function that PyTorch has renamed.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
