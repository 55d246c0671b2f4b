"""What a training step costs, from the plain form to the one that `mcl pretrain` takes, one change after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TypeVar

import torch

from launch.benchmarks.step_forms import GrowingStep, LogSumExpForm, TrainerStep, forms, noise
from launch.run.config import PretrainConfig
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.objective.flops import operations_per_video
from mcl_dist.training.deepspeed_engine import pick_device
from mcl_dist.training.phase_timer import PhaseTimer
from mcl_dist.training.trainer import peak_bytes

PHASES = ("copy", "keys", "forward", "backward", "optimizer", "momentum", "queue", "other")
WARM_UP = 3  # steps; the first compiles, the next two settle the allocators
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}  # large enough for the full rate
MATMUL_ROUNDS = 10

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class StepResult:
    """One form of the step, measured; each has a process of its own.

    Attributes:
        name: the change over the form before; `plain` is the first, `trainer` the step of `mcl pretrain` itself.
        videos_per_second: throughput of the fastest step: whatever else the machine does only adds.
        ms: milliseconds of that step by phase.
        cpu_ms: milliseconds that the processors spent on the step that took them least, whatever else they did.
        peak_bytes: the most memory held, of the GPU's or of the process.
        tflops: 10¹² floating-point operations a second, of the convolutions and matrix products that the step needs.
        matmul_share: of the rate of one large matrix product in the step's precision, measured beside it.
        speedup: the first form's time over its own. On a CPU speedup and share go by the processors' time, in which
            what else runs there does not count.
        loss: of the first step, where all forms hold the same weights.
    """

    name: str
    videos_per_second: float
    ms: dict[str, float]
    cpu_ms: float
    peak_bytes: int
    tflops: float
    matmul_share: float
    speedup: float
    loss: float


@dataclass(frozen=True)
class _Measured:
    milliseconds: float
    ms: dict[str, float]
    cpu_ms: float
    peak_bytes: int
    matmul_ms: float
    loss: float


def benchmark(
    config: PretrainConfig, steps: int, say: Callable[[str], None], names: Sequence[str] = ()
) -> list[StepResult]:
    """Measure forms on videos of noise, the global batch on one device; those of these names, or all.

    Raises:
        ConfigError: no form has such a name here.
        UserError: when a process dies, which is mostly for want of memory.
    """
    device = pick_device()
    matmul_operations = 2 * MATMUL_SIDE[device.type] ** 3
    clip = config.data.frames, config.data.crop
    operations = config.train.global_batch * operations_per_video(config.encoder, config.heads, *clip)
    costs: list[float] = []
    results: list[StepResult] = []
    for form in _named(forms(config, device), names):
        say(f"measuring {form.name}")
        found = in_a_process(_measure, config, form, steps)
        costs.append(found.cpu_ms if device.type == "cpu" else found.milliseconds)
        results.append(
            StepResult(
                name=form.name,
                videos_per_second=config.train.global_batch / found.milliseconds * 1e3,
                ms=found.ms,
                cpu_ms=found.cpu_ms,
                peak_bytes=found.peak_bytes,
                tflops=operations / found.milliseconds / 1e9,
                matmul_share=operations / costs[-1] / (matmul_operations / found.matmul_ms),
                speedup=costs[0] / costs[-1],
                loss=found.loss,
            )
        )
        # Told at once: whoever stops what takes too long has what was measured.
        say(f"{form.name}: {results[-1].videos_per_second:.2f} videos/s, {results[-1].speedup:.2f} times the first")
    return results


def _named(found: list[LogSumExpForm], names: Sequence[str]) -> list[LogSumExpForm]:
    for name in names:
        if name not in (form.name for form in found):
            raise ConfigError(f"--forms: found {name}, must be of {', '.join(form.name for form in found)}")
    return [form for form in found if form.name in names or not names]


def _measure(config: PretrainConfig, form: LogSumExpForm, steps: int) -> _Measured:
    device = pick_device()
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, for all forms
    matmul_ms = _matmul_ms(device, torch.bfloat16 if form.bfloat16 else torch.float32)
    step = (TrainerStep if form.trainer else GrowingStep)(config, form, device)
    batch = noise(config, device)
    step(batch, lambda _: None)
    loss = float(step.loss)
    for _ in range(WARM_UP - 1):
        step(batch, lambda _: None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clocks, cpu = [], []
    for _ in range(steps):
        start, clock = time.process_time(), PhaseTimer(device)
        step(batch, clock.mark)
        clock.mark("other")
        clocks.append(clock)
        cpu.append(time.process_time() - start)
    fastest = min((clock.seconds() for clock in clocks), key=_total)
    return _Measured(
        milliseconds=_total(fastest) * 1e3,
        ms={phase: fastest.get(phase, 0.0) * 1e3 for phase in PHASES},
        cpu_ms=min(cpu) * 1e3,
        peak_bytes=peak_bytes(device),
        matmul_ms=matmul_ms,
        loss=loss,
    )


def _matmul_ms(device: torch.device, dtype: torch.dtype) -> float:
    """Milliseconds of a large matrix product, the best of some rounds: of the processors, or of the GPU."""
    side = MATMUL_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    rounds = []
    for _ in range(MATMUL_ROUNDS):
        clock, start = PhaseTimer(device), time.process_time()
        left @ right
        clock.mark("matmul")
        spent = time.process_time() - start
        rounds.append(spent if device.type == "cpu" else _total(clock.seconds()))
    return min(rounds) * 1e3


def _total(seconds: dict[str, float]) -> float:
    return sum(seconds.values())


def in_a_process(function: Callable[..., _Result], *arguments: object) -> _Result:
    """Memory that one form leaves behind is not the next one's."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise UserError("a process died, probably for want of memory; lower train.global_batch") from error
