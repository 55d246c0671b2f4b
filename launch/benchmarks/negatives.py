"""What the inter loss costs over a large queue, form by form: forward and backward, time and peak memory."""

from __future__ import annotations

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
from mcl_dist.objective.log_sum_exp import LogSumExpForm, chunked, fused, fused_runs
from mcl_dist.objective.losses import inter_loss, own_similarities
from mcl_dist.objective.negative_queue import NegativeQueue

TEMPERATURE = 0.1
REPEATS = 5
WARM_UP_SIZE = 4096  # vectors of a first round that starts threads and libraries
FORMS: dict[str, tuple[LogSumExpForm, bool]] = {  # how they pass over the queue, and whether it is sharded
    "chunked": (chunked, False),
    "sharded": (chunked, True),
    "fused": (fused, True),
}


@dataclass(frozen=True)
class NegativesResult:
    """One form's cost.

    Attributes:
        name: `naive` forms all logits; `chunked` does not; `sharded` is chunked with K/W negatives on a rank; `fused`
            is sharded, by the attention kernel.
        ms: of forward and backward, the fastest of five rounds: whatever else runs only adds.
        peak_bytes: memory at the most beyond what queue and queries take, on the rank that needed most.
        loss: mean over the ranks.
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
    count: int
    meeting: str


def benchmark(size: int, batch: int, dim: int, count: int) -> Iterator[NegativesResult]:
    """Measure every form, each in processes of its own, one a rank.

    Args:
        size: K.
        batch: queries of a rank.
        dim: d.
        count: W ranks; GPUs where there are as many, else CPU processes that share the cores.

    Raises:
        UserError: when a process dies, which is mostly for want of memory.
    """
    names = ["naive", *FORMS]
    if not fused_runs(torch.empty(1, dim, device=_device(0, count))):
        names.remove("fused")
    for name in names:
        with tempfile.TemporaryDirectory(prefix="mcl-bench-") as folder:
            task = _Task(name, size, batch, dim, count, f"file://{folder}/meeting")
            try:
                with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
                    first, *_ = pool.map(_measure, [task] * count, range(count))
                yield first
            except BrokenProcessPool as error:
                raise UserError(f"{name}: a process died, probably for want of memory; lower --queue") from error


def _measure(task: _Task, rank: int) -> NegativesResult:
    device = _device(rank, task.count)
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // task.count))
    else:
        torch.cuda.set_device(device)
    if task.count > 1:
        backend = "gloo" if device.type == "cpu" else "nccl"
        distributed.init_process_group(backend, init_method=task.meeting, rank=rank, world_size=task.count)
    group = ProcessGroup(device)
    _round(task, group, min(task.size, WARM_UP_SIZE))()
    measured = _round(task, group, task.size)
    # The first round at full size: later ones find freed memory that the process still holds.
    loss, peak = _with_peak_memory(measured, device)
    ms = min(_timed(measured, group) for _ in range(REPEATS))
    peak = int(group.gather(torch.tensor([peak], device=device)).max())
    result = NegativesResult(task.name, ms, peak, float(group.mean(loss)))
    if task.count > 1:
        group.barrier()
        distributed.destroy_process_group()
    return result


def _round(task: _Task, group: ProcessGroup, size: int) -> Callable[[], torch.Tensor]:
    """Forward and backward of the inter loss of this rank's queries, by the task's form."""
    form, sharded = FORMS.get(task.name, (chunked, False))
    draws = torch.Generator().manual_seed(0)
    queue = NegativeQueue.random(size, task.dim, draws, group.device, group=group, sharded=sharded, form=form)
    num_vectors = 1 + NUM_VIEWS - FIRST_KEY
    vectors = normalize(torch.randn(group.size, num_vectors, task.batch, task.dim, generator=draws), dim=3)
    queries, *keys = vectors[group.rank].to(group.device)
    own_keys = torch.stack(keys)

    def once() -> torch.Tensor:
        leaf = queries.clone().requires_grad_()
        if task.name == "naive":
            against = torch.logsumexp(leaf @ queue.vectors.T / TEMPERATURE, dim=1)
        else:
            against = queue.against(leaf, TEMPERATURE)
        loss = inter_loss(own_similarities(leaf, own_keys), against, TEMPERATURE)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return once


def _timed(once: Callable[[], torch.Tensor], group: ProcessGroup) -> float:
    """Milliseconds of a round that all ranks begin together."""
    group.barrier()
    start = time.perf_counter()
    once().item()  # waits for a GPU
    return (time.perf_counter() - start) * 1e3


def _with_peak_memory(once: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, int]:
    """A round's loss, and the bytes at its most beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return once(), torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux's word for: forget the peak so far
    before = _resident("VmRSS")
    return once(), max(0, _resident("VmHWM") - before)  # Linux counts pages roughly


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _device(rank: int, count: int) -> torch.device:
    return torch.device("cuda", rank) if torch.cuda.device_count() >= count else torch.device("cpu")
