"""DeepSpeed around the objective: process group, optimizer, ZeRO, and optimizer state in and out.

The optimizer's state travels by parameter name and in full, so that any number of ranks can load it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mcl_dist.config import choice, number
from mcl_dist.objective import Objective

STATE_KEYS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
ADAMW_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become steps; the defaults are METHOD.md's, section 5, for Kinetics.

    Attributes:
        name: `sgd` or `adamw`.
        learning_rate: at the end of the warm-up, for the configured global batch.
        momentum: of SGD; AdamW has its usual 0.9 and 0.999.
        weight_decay: on every parameter.
        warmup_epochs: of the learning rate, and of the doubled alignment loss.
        zero_stage: 0 replicates the optimizer's state, 1 shards it, 2 shards gradients too.
    """

    name: str = choice("sgd", "adamw")
    learning_rate: float = number(0.02, minimum=0)
    momentum: float = number(0.9, minimum=0, maximum=1)
    weight_decay: float = number(1e-4, minimum=0)
    warmup_epochs: float = number(5.0, minimum=0)
    zero_stage: int = number(1, minimum=0, maximum=2)


def pick_device() -> torch.device:
    """This rank's GPU where there is one, else the CPU; also tells DeepSpeed which."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    threads = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_SIZE", "1"))
    torch.set_num_threads(max(1, threads))
    return torch.device("cpu")


def join_process_group(device: torch.device) -> None:
    """Meet the other ranks that the launcher started: NCCL between GPUs, gloo between CPUs."""
    deepspeed = _deepspeed()
    if device.type == "cpu":
        # Its shared-memory collectives compile for 18 s at first use and win nothing at this size.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)


class Engine:
    """Forward, backward and step of the objective under DeepSpeed."""

    def __init__(self, objective: Objective, config: OptimizerConfig, *, batch_per_rank: int) -> None:
        self.objective = objective
        self._state_keys = STATE_KEYS[config.name] if config.name == "adamw" or config.momentum else ()
        self._engine, *_ = _deepspeed().initialize(
            model=objective,
            optimizer=_optimizer(objective, config),
            config={
                "train_micro_batch_size_per_gpu": batch_per_rank,
                "gradient_clipping": 0.0,  # DeepSpeed's default of 1.0 is not MCL's
                "zero_optimization": {"stage": config.zero_stage},
                "zero_allow_untested_optimizer": True,
            },
        )
        self._is_sharded = config.zero_stage > 0

    def forward(self, *inputs: Any) -> torch.Tensor:
        """The objective's scalar."""
        loss: torch.Tensor = self._engine(*inputs)
        return loss

    def step(self, loss: torch.Tensor, learning_rate: float) -> None:
        """Backward, reduce over ranks, and update the parameters."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.backward(loss)
        self._engine.step()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Full state of every parameter as `key/name`, on the CPU; all ranks must call it together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        for name, parameter in self._named_parameters():
            for key in self._state_keys:
                value = (
                    safe_get_full_optimizer_state(parameter, key)
                    if self._is_sharded
                    else self._engine.optimizer.state[parameter][key]
                )
                state[f"{key}/{name}"] = value.detach().cpu().clone()
        return state

    def load_optimizer_state(self, state: dict[str, torch.Tensor], step: int) -> None:
        """Take over what `optimizer_state` gave after `step` steps; before the first step of this engine."""
        for key in self._state_keys:
            full = {name: state[f"{key}/{name}"] for name, _ in self._named_parameters()}
            for owner, value in self._scattered(full):
                self._torch_state(owner)[key] = value
                if "exp_avg" in self._state_keys:
                    self._torch_state(owner)["step"] = torch.tensor(float(step))

    def _scattered(self, full: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of what the optimizer steps (a parameter, or this rank's flat shard) and its state's values."""
        if not self._is_sharded:
            yield from ((parameter, full[name].to(parameter)) for name, parameter in self._named_parameters())
            return
        names = {id(parameter): name for name, parameter in self._named_parameters()}
        zero = self._engine.optimizer
        for group, shard in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            values = torch.zeros_like(shard)
            for parameter in group:
                fragment = parameter._hp_mapping  # None where the shard holds nothing of this parameter
                if fragment is not None:
                    to, source = fragment.hp_fragment_address, fragment.lp_fragment_address
                    piece = full[names[id(parameter)]].flatten()[source.start : source.start + source.numel]
                    values[to.start : to.start + to.numel] = piece.to(values)
            yield shard, values

    def _torch_state(self, owner: torch.Tensor) -> dict[str, torch.Tensor]:
        optimizer = self._engine.optimizer.optimizer if self._is_sharded else self._engine.optimizer
        state: dict[str, torch.Tensor] = optimizer.state[owner]
        return state

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.objective.network.named_parameters()


def _optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    parameters, rate, decay = list(module.parameters()), config.learning_rate, config.weight_decay
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=ADAMW_BETAS, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=config.momentum, weight_decay=decay)


def _deepspeed() -> Any:
    """DeepSpeed, imported once the accelerator is chosen, its own talk kept to errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside DeepSpeed that nobody here can act on
        import deepspeed
    # It gathers through a function that PyTorch has renamed.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
