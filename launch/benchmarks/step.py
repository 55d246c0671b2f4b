"""Cost of a training step, from the reference to the step of `mcl pretrain`, one optimisation after another."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TypeVar

import torch

from launch.benchmarks.step_variants import StandaloneStep, StepVariant, TrainerStep, noise, step_variants
from launch.run.config import PretrainConfig
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.objective.flops import flops_per_video
from mcl_dist.training.deepspeed_engine import pick_device
from mcl_dist.training.phase_timer import PhaseTimer
from mcl_dist.training.trainer import peak_bytes

PHASES = ("copy", "keys", "forward", "backward", "optimizer", "momentum", "queue", "other")
WARM_UP = 3  # steps: the first compiles, the next two settle the allocators
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}  # large enough for the full rate
MATMUL_ROUNDS = 10

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class StepResult:
    """Measurements of one variant of the step, in a process of its own.

    Attributes:
        name: the optimisation added to the previous variant; `plain` is the reference, `trainer` the step of
            `mcl pretrain`.
        videos_per_second: throughput of the fastest step; other load on the machine only slows steps down.
        ms: milliseconds of that step by phase.
        cpu_ms: CPU milliseconds of the step that used least.
        peak_bytes: peak memory of the GPU or of the process.
        tflops: 10¹² floating-point operations per second, counting the convolutions and matrix products of the step.
        matmul_share: share of the rate of one large matrix product in the step's precision, measured beside it.
        speedup: the first variant's time over this one's. On a CPU, speedup and share use CPU time, which excludes
            other processes.
        loss: of the first step, for which all variants have the same weights.
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
class _Measurement:
    total_ms: float
    ms: dict[str, float]
    cpu_ms: float
    peak_bytes: int
    matmul_ms: float
    loss: float


def measure_step(
    config: PretrainConfig, steps: int, log: Callable[[str], None], names: Sequence[str] = ()
) -> list[StepResult]:
    """Measure steps on noise of the variants `names`, by default of all, with the global batch on one device.

    Raises:
        ConfigError: there is no variant of such a name.
        UserError: a process dies, most likely for lack of memory.
    """
    results: list[StepResult] = []
    first: _Measurement | None = None
    for variant in _select(step_variants(config, pick_device()), names):
        log(f"measuring {variant.name}")
        found = run_in_process(_measure, config, variant, steps)
        first = first or found
        results.append(_result(config, variant.name, found, first))
        # Log each result at once, so that an interrupted benchmark keeps what it has measured.
        log(f"{variant.name}: {results[-1].videos_per_second:.2f} videos/s, {results[-1].speedup:.2f} times the first")
    return results


def _result(config: PretrainConfig, name: str, found: _Measurement, first: _Measurement) -> StepResult:
    device = pick_device()
    matmul_flops = 2 * MATMUL_SIDE[device.type] ** 3
    clip = config.data.frames, config.data.crop
    flops = config.train.global_batch * flops_per_video(config.encoder, config.heads, *clip)
    cost, first_cost = (each.cpu_ms if device.type == "cpu" else each.total_ms for each in (found, first))
    return StepResult(
        name=name,
        videos_per_second=config.train.global_batch / found.total_ms * 1e3,
        ms=found.ms,
        cpu_ms=found.cpu_ms,
        peak_bytes=found.peak_bytes,
        tflops=flops / found.total_ms / 1e9,
        matmul_share=flops / cost / (matmul_flops / found.matmul_ms),
        speedup=first_cost / cost,
        loss=found.loss,
    )


def _select(variants: list[StepVariant], names: Sequence[str]) -> list[StepVariant]:
    known = [variant.name for variant in variants]
    for name in names:
        if name not in known:
            raise ConfigError(f"--forms: found {name}, must be of {', '.join(known)}")
    return [variant for variant in variants if variant.name in names or not names]


def _measure(config: PretrainConfig, variant: StepVariant, steps: int) -> _Measurement:
    device = pick_device()
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, for all variants
    matmul_ms = _matmul_ms(device, torch.bfloat16 if variant.bfloat16 else torch.float32)
    step = (TrainerStep if variant.trainer else StandaloneStep)(config, variant, device)
    batch = noise(config, device)
    step(batch, lambda _: None)
    loss = float(step.loss)
    for _ in range(WARM_UP - 1):
        step(batch, lambda _: None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timers, cpu_seconds = [], []
    for _ in range(steps):
        start, timer = time.process_time(), PhaseTimer(device)
        step(batch, timer.mark)
        timer.mark("other")
        timers.append(timer)
        cpu_seconds.append(time.process_time() - start)
    fastest = min((timer.seconds() for timer in timers), key=lambda seconds: sum(seconds.values()))
    return _Measurement(
        total_ms=sum(fastest.values()) * 1e3,
        ms={phase: fastest.get(phase, 0.0) * 1e3 for phase in PHASES},
        cpu_ms=min(cpu_seconds) * 1e3,
        peak_bytes=peak_bytes(device),
        matmul_ms=matmul_ms,
        loss=loss,
    )


def _matmul_ms(device: torch.device, dtype: torch.dtype) -> float:
    """Milliseconds of a large matrix product, the best of several rounds: CPU time, or time on the GPU."""
    side = MATMUL_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    rounds = []
    for _ in range(MATMUL_ROUNDS):
        timer, start = PhaseTimer(device), time.process_time()
        left @ right
        timer.mark("matmul")
        cpu_seconds = time.process_time() - start
        rounds.append(cpu_seconds if device.type == "cpu" else timer.seconds()["matmul"])
    return min(rounds) * 1e3


def run_in_process(function: Callable[..., _Result], *arguments: object) -> _Result:
    """Run a function in a new process, without the memory of earlier ones; raises UserError if the process dies."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise UserError("a process died, probably for lack of memory; lower train.global_batch") from error
