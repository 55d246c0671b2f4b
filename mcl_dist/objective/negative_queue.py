"""The queue of past keys that serve as negatives (METHOD.md, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import ConfigError
from mcl_dist.model.compiler import uncompiled
from mcl_dist.objective.log_sum_exp import LogSumExp, LogSumExpForm, log_sum_exp


class NegativeQueue:
    """K unit vectors in a ring, the oldest overwritten first.

    Replicated, every rank holds them all. Sharded, rank r of W holds those from ⌊K·r/W⌋ to ⌊K·(r+1)/W⌋: queries then
    visit all ranks, and what they find there comes back. Results are the same.

    Attributes:
        vectors: float, those that this rank holds.
        position: where in the ring the next key is written.
        size: K.
    """

    def __init__(
        self,
        vectors: torch.Tensor,
        position: int = 0,
        *,
        group: ProcessGroup | None = None,
        sharded: bool = False,
        form: LogSumExpForm = log_sum_exp,
    ) -> None:
        """Take the rank's part of all vectors (K, d); `form` is the pass over them.

        Raises:
            ConfigError: when there are fewer vectors than ranks to hold them.
        """
        self._group = group or ProcessGroup()
        self._sharded = sharded and self._group.size > 1
        self._form = form
        self.size = len(vectors)
        if self._sharded and self.size < self._group.size:
            raise ConfigError(
                f"objective.queue: {self.size} negatives cannot be shared by {self._group.size} ranks; "
                f"set it to {self._group.size} or more, or objective.negatives=replicated"
            )
        self.vectors = vectors[self._held()].clone()
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
        form: LogSumExpForm = log_sum_exp,
    ) -> NegativeQueue:
        """A queue of random directions, float32, the same for equal generators."""
        vectors = normalize(torch.randn(size, dim, generator=generator), dim=1)
        queue = cls(vectors, group=group, sharded=sharded, form=form)
        queue.vectors = queue.vectors.to(device)
        return queue

    @uncompiled
    def against(self, queries: torch.Tensor, temperature: float) -> torch.Tensor:
        """log Σ_k exp(q·v_k/τ) of this rank's queries (B, d) over all K vectors: (B,), differentiable.

        The logits (B, K) are never formed. When the queue is sharded, all ranks must call it together.
        """
        result: torch.Tensor = _Against.apply(queries, self, temperature)  # type: ignore[no-untyped-call]
        return result

    @uncompiled
    @torch.no_grad()
    def mean(self) -> torch.Tensor:
        """Mean of all K vectors: (d,). When the queue is sharded, all ranks must call it together."""
        total = self.vectors.sum(dim=0)
        return self._group.sum(total) / self.size if self._sharded else total / self.size

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor, taken: torch.Tensor | None = None) -> None:
        """Write the keys of all ranks (3, B·W, d): all first, all second, all third, wrapping around.

        When they outnumber the queue, the newest stay.

        Args:
            keys: of this step.
            taken: a scalar on the device, 0 where the step is skipped: the vectors then stay, though the position moves
                on; its owner, who learns of the skip later, sets that back.
        """
        rows = keys.flatten(0, 1)
        surplus = max(0, len(rows) - self.size)
        place = (self.position + surplus) % self.size
        until_end = surplus + self.size - place
        self._write(rows[surplus:until_end], place, taken)
        self._write(rows[until_end:], 0, taken)
        self.position = (self.position + len(rows)) % self.size

    def share(self) -> torch.Tensor:
        """This rank's part (k, d), not copied: those of all ranks, in their order, are the K vectors."""
        return self.vectors if self._sharded else self.vectors[self._part()]

    def load(self, vectors: torch.Tensor, position: int) -> None:
        """Take over all K vectors (K, d), and the position that went with them, whatever number of ranks had them."""
        self.vectors.copy_(vectors[self._held()])
        self.position = position

    def log_sum_exp(self, queries: torch.Tensor, temperature: float) -> LogSumExp:
        """Of this rank's queries over all K vectors."""
        queries = queries.to(self.vectors.dtype)
        if not self._sharded:
            return self._form(queries, self.vectors, temperature)
        here = self._form(self._group.gather(queries), self.vectors, temperature)
        everywhere = self._group.exchange(torch.cat([here.value[:, None], here.mean], dim=1))
        parts = everywhere.view(self._group.size, len(queries), -1)
        return LogSumExp.merged(parts[:, :, 0], parts[:, :, 1:])

    def _part(self) -> slice:
        """Where this rank's equal part of the ring is."""
        rank, count = self._group.rank, self._group.size
        return slice(self.size * rank // count, self.size * (rank + 1) // count)

    def _held(self) -> slice:
        """Where what this rank holds is."""
        return self._part() if self._sharded else slice(0, self.size)

    def _write(self, rows: torch.Tensor, place: int, taken: torch.Tensor | None) -> None:
        """Write those of the rows, which go to `place` and after, that fall to this rank."""
        held = self._held()
        start, stop = held.start, held.stop
        first, last = max(place, start), min(place + len(rows), stop)
        if first < last:
            here = self.vectors[first - start : last - start]
            new = rows[first - place : last - place].to(here.dtype)
            here.copy_(new if taken is None else torch.where(taken > 0, new, here))


class _Against(torch.autograd.Function):
    """The pass over the queue finds the gradient as well, so the way back needs neither queue nor ranks."""

    @staticmethod
    def forward(ctx: Any, queries: torch.Tensor, queue: NegativeQueue, temperature: float) -> torch.Tensor:
        found = queue.log_sum_exp(queries, temperature)
        ctx.save_for_backward((found.mean / temperature).to(queries.dtype))
        return found.value.to(queries.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_value: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return d_value[:, None] * gradient, None, None
