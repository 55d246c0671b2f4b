"""Time and peak memory of the inter loss over a large queue, forward and backward, for each implementation."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import distributed
from torch.nn.functional import normalize

from mcl_dist.batch import FIRST_KEY, NUM_VIEWS
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.objective.log_sum_exp import LogSumExpKernel, chunked, fused, has_fused_kernel
from mcl_dist.objective.losses import inter_loss, key_similarities
from mcl_dist.objective.negative_queue import NegativeQueue

TEMPERATURE = 0.1
REPEATS = 5
WARM_UP_SIZE = 4096  # negatives in a first round that starts threads and libraries
VARIANTS: dict[str, tuple[LogSumExpKernel, bool]] = {  # kernel, and whether the queue is sharded
    "chunked": (chunked, False),
    "sharded": (chunked, True),
    "fused": (fused, True),
}


@dataclass(frozen=True)
class NegativesResult:
    """Cost of one variant.

    Attributes:
        name: `naive` materialises all logits; `chunked` does not; `sharded` is chunked with K/W negatives per rank;
            `fused` is sharded with the attention kernel.
        ms: forward and backward, the fastest of five rounds: other load only slows rounds down.
        peak_bytes: peak memory in addition to queue and queries, on the rank that needed most.
        loss: mean over ranks.
    """

    name: str
    ms: float
    peak_bytes: int
    loss: float


@dataclass(frozen=True)
class _Task:
    name: str
    size: int
    batch: int
    dim: int
    num_ranks: int
    rendezvous_url: str


def measure_negatives(size: int, batch: int, dim: int, num_ranks: int) -> Iterator[NegativesResult]:
    """Measure every variant with `size` negatives and `batch` queries per rank of `dim` numbers.

    Each variant has its own processes, one per rank; each rank has a GPU if there are enough, else they share the CPU
    cores. Raises UserError if a process dies, most likely for lack of memory.
    """
    names = ["naive", *VARIANTS]
    if not has_fused_kernel(torch.empty(1, dim, device=_device(0, num_ranks))):
        names.remove("fused")
    for name in names:
        with tempfile.TemporaryDirectory(prefix="mcl-bench-") as folder:
            task = _Task(name, size, batch, dim, num_ranks, f"file://{folder}/rendezvous")
            try:
                with ProcessPoolExecutor(num_ranks, mp_context=get_context("spawn")) as pool:
                    first, *_ = pool.map(_measure, [task] * num_ranks, range(num_ranks))
                yield first
            except BrokenProcessPool as error:
                raise UserError(f"{name}: a process died, probably for lack of memory; lower --queue") from error


def _measure(task: _Task, rank: int) -> NegativesResult:
    device = _device(rank, task.num_ranks)
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // task.num_ranks))
    else:
        torch.cuda.set_device(device)
    if task.num_ranks > 1:
        backend = "gloo" if device.type == "cpu" else "nccl"
        distributed.init_process_group(backend, init_method=task.rendezvous_url, rank=rank, world_size=task.num_ranks)
    group = ProcessGroup(device)
    _round(task, group, min(task.size, WARM_UP_SIZE))()
    run_round = _round(task, group, task.size)
    # Memory is measured in the first round at full size: later rounds reuse memory that the process has kept.
    loss, peak = _with_peak_memory(run_round, device)
    ms = min(_timed(run_round, group) for _ in range(REPEATS))
    peak = int(group.gather(torch.tensor([peak], device=device)).max())
    result = NegativesResult(task.name, ms, peak, float(group.mean(loss)))
    if task.num_ranks > 1:
        group.barrier()
        distributed.destroy_process_group()
    return result


def _round(task: _Task, group: ProcessGroup, size: int) -> Callable[[], torch.Tensor]:
    """A function that runs forward and backward of the inter loss for this rank's queries, in the task's variant."""
    kernel, sharded = VARIANTS.get(task.name, (chunked, False))
    draws = torch.Generator().manual_seed(0)
    queue = NegativeQueue.random(size, task.dim, draws, group.device, group=group, sharded=sharded, kernel=kernel)
    num_vectors = 1 + NUM_VIEWS - FIRST_KEY
    vectors = normalize(torch.randn(group.size, num_vectors, task.batch, task.dim, generator=draws), dim=3)
    queries, *keys = vectors[group.rank].to(group.device)
    own_keys = torch.stack(keys)

    def once() -> torch.Tensor:
        leaf = queries.clone().requires_grad_()
        if task.name == "naive":
            negatives = torch.logsumexp(leaf @ queue.vectors.T / TEMPERATURE, dim=1)
        else:
            negatives = queue.log_sum_exp(leaf, TEMPERATURE)
        loss = inter_loss(key_similarities(leaf, own_keys), negatives, TEMPERATURE)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return once


def _timed(once: Callable[[], torch.Tensor], group: ProcessGroup) -> float:
    """Milliseconds of a round, which all ranks begin together."""
    group.barrier()
    start = time.perf_counter()
    once().item()  # waits for a GPU
    return (time.perf_counter() - start) * 1e3


def _with_peak_memory(once: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, int]:
    """A round's loss, and its peak memory in bytes beyond the memory in use before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return once(), torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
    before = _resident("VmRSS")
    return once(), max(0, _resident("VmHWM") - before)  # Linux's page counts are approximate


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _device(rank: int, num_ranks: int) -> torch.device:
    return torch.device("cuda", rank) if torch.cuda.device_count() >= num_ranks else torch.device("cpu")
