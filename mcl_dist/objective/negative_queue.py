"""The queue of past keys that serve as negatives (METHOD.md, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import ConfigError
from mcl_dist.model.compiler import disable_compile
from mcl_dist.objective.log_sum_exp import LogSumExp, LogSumExpKernel, log_sum_exp


class NegativeQueue:
    """Ring buffer of K unit vectors; new keys overwrite the oldest.

    Replicated, every rank holds all vectors. Sharded, rank r of W holds those from ⌊K·r/W⌋ to ⌊K·(r+1)/W⌋: every rank
    evaluates all ranks' queries on its shard, and the results are merged. Both give the same results.

    Attributes:
        vectors: float, those that this rank holds.
        position: index in the ring of the next key.
        size: K.
    """

    def __init__(
        self,
        vectors: torch.Tensor,
        position: int = 0,
        *,
        group: ProcessGroup | None = None,
        sharded: bool = False,
        kernel: LogSumExpKernel = log_sum_exp,
    ) -> None:
        """Keep this rank's shard of all vectors (K, d).

        Raises:
            ConfigError: there are fewer vectors than ranks.
        """
        self._group = group or ProcessGroup()
        self._sharded = sharded and self._group.size > 1
        self._kernel = kernel
        self.size = len(vectors)
        if self._sharded and self.size < self._group.size:
            raise ConfigError(
                f"objective.queue: {self.size} negatives cannot be sharded over {self._group.size} ranks; "
                f"set it to {self._group.size} or more, or objective.negatives=replicated"
            )
        self.vectors = vectors[self._local_slice()].clone()
        self.position = position

    @classmethod
    def random(
        cls,
        size: int,
        dim: int,
        generator: torch.Generator,
        device: torch.device,
        *,
        group: ProcessGroup | None = None,
        sharded: bool = False,
        kernel: LogSumExpKernel = log_sum_exp,
    ) -> NegativeQueue:
        """A queue of random unit vectors, float32, equal for equal generators."""
        vectors = normalize(torch.randn(size, dim, generator=generator), dim=1)
        queue = cls(vectors, group=group, sharded=sharded, kernel=kernel)
        queue.vectors = queue.vectors.to(device)
        return queue

    @disable_compile
    def log_sum_exp(self, queries: torch.Tensor, temperature: float) -> torch.Tensor:
        """log Σ_k exp(q·v_k/τ) of this rank's queries (B, d) over all K vectors: (B,), differentiable.

        The logits (B, K) are never materialised. All ranks must call it together if the queue is sharded.
        """
        result: torch.Tensor = _QueueLogSumExp.apply(queries, self, temperature)  # type: ignore[no-untyped-call]
        return result

    @disable_compile
    @torch.no_grad()
    def mean(self) -> torch.Tensor:
        """Mean of all K vectors: (d,). All ranks must call it together if the queue is sharded."""
        total = self.vectors.sum(dim=0)
        return self._group.sum(total) / self.size if self._sharded else total / self.size

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor, taken: torch.Tensor | None = None) -> None:
        """Write the keys of all ranks (3, B·W, d) from `position` on: all first, then all second, then all third keys.

        Of more keys than K, the last K remain. `taken` is a scalar on the device, 0 for a skipped step: then the
        vectors stay, but the position advances. The caller resets it once it has read that the step was skipped.
        """
        rows = keys.flatten(0, 1)
        surplus = max(0, len(rows) - self.size)
        start = (self.position + surplus) % self.size
        until_end = surplus + self.size - start
        self._write(rows[surplus:until_end], start, taken)
        self._write(rows[until_end:], 0, taken)
        self.position = (self.position + len(rows)) % self.size

    def shard(self) -> torch.Tensor:
        """This rank's shard (k, d), not copied; the shards of all ranks in rank order are the K vectors."""
        return self.vectors if self._sharded else self.vectors[self._shard_slice()]

    def load(self, vectors: torch.Tensor, position: int) -> None:
        """Load all K vectors (K, d) and their position, saved by any number of ranks."""
        self.vectors.copy_(vectors[self._local_slice()])
        self.position = position

    def forward_log_sum_exp(self, queries: torch.Tensor, temperature: float) -> LogSumExp:
        """Value and weighted mean of `log_sum_exp`, without gradients."""
        queries = queries.to(self.vectors.dtype)
        if not self._sharded:
            return self._kernel(queries, self.vectors, temperature)
        local = self._kernel(self._group.gather(queries), self.vectors, temperature)
        gathered = self._group.exchange(torch.cat([local.value[:, None], local.mean], dim=1))
        parts = gathered.view(self._group.size, len(queries), -1)
        return LogSumExp.merge(parts[:, :, 0], parts[:, :, 1:])

    def _shard_slice(self) -> slice:
        """Range in the ring of this rank's shard."""
        rank, count = self._group.rank, self._group.size
        return slice(self.size * rank // count, self.size * (rank + 1) // count)

    def _local_slice(self) -> slice:
        """Range in the ring of `vectors`."""
        return self._shard_slice() if self._sharded else slice(0, self.size)

    def _write(self, rows: torch.Tensor, start: int, taken: torch.Tensor | None) -> None:
        """Write to `vectors` the rows that fall into its range; `start` is the first row's index in the ring."""
        local = self._local_slice()
        first, last = max(start, local.start), min(start + len(rows), local.stop)
        if first < last:
            target = self.vectors[first - local.start : last - local.start]
            new = rows[first - start : last - start].to(target.dtype)
            target.copy_(new if taken is None else torch.where(taken > 0, new, target))


class _QueueLogSumExp(torch.autograd.Function):
    """The forward pass computes the gradient too, so the backward needs neither the queue nor other ranks."""

    @staticmethod
    def forward(ctx: Any, queries: torch.Tensor, queue: NegativeQueue, temperature: float) -> torch.Tensor:
        result = queue.forward_log_sum_exp(queries, temperature)
        ctx.save_for_backward((result.mean / temperature).to(queries.dtype))
        return result.value.to(queries.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_value: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return d_value[:, None] * gradient, None, None
