"""The processes of one run, and what passes between them."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import distributed_c10d

TEXT_BYTES = 256  # of a text on its way to other ranks
PATIENT = "patient"  # describes groups that keep the timeout that they were made with


class ProcessGroup:
    """This process among `size`; alone when torch.distributed was not initialised.

    Args:
        device: where tensors live that ranks exchange.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        together = distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.size = distributed.get_world_size() if together else 1

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            distributed.barrier()

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, …) of all ranks, in rank order: (B·W, …)."""
        if self.size == 1:
            return rows
        rows = rows.to(self.device).contiguous()
        gathered = [torch.empty_like(rows) for _ in range(self.size)]
        distributed.all_gather(gathered, rows)
        return torch.cat(gathered)

    def gather_texts(self, text: str) -> list[str]:
        """A short text of every rank, in rank order; what goes beyond `TEXT_BYTES` is cut off."""
        row = torch.frombuffer(bytearray(text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")), dtype=torch.uint8)
        rows = self.gather(row[None]).cpu().numpy()
        return [each.tobytes().rstrip(b"\0").decode(errors="replace") for each in rows]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, elementwise."""
        if self.size == 1:
            return values
        total = values.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over ranks, elementwise."""
        return self.sum(values) / self.size

    def exchange(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (W·B, …) in W blocks, the r-th for rank r: the blocks for this rank, in rank order, (W·B, …)."""
        if self.size == 1:
            return rows
        received = torch.empty_like(rows)
        distributed.all_to_all_single(received, rows.contiguous())
        return received

    def from_first(self, number: int) -> int:
        """The first rank's number, on every rank."""
        if self.size == 1:
            return number
        shared = torch.tensor(number, device=self.device)
        distributed.broadcast(shared, src=0)
        return int(shared)

    def first_word(self, text: str) -> str:
        """The text of the first rank that has any, with that rank's number; empty where none has."""
        words = enumerate(self.gather_texts(text))
        return next((f"{word} at rank {rank}" for rank, word in words if word), "")

    def permute(self, rows: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
        """Rearrange the rows of all ranks: row i of the result, over ranks, is row `permutation[i]` before.

        Each rank sends only its own rows, so its traffic does not grow with the number of ranks.

        Args:
            rows: (B, …), this rank's.
            permutation: int64 (B·W,) on the CPU, the same on every rank.
        """
        if self.size == 1:
            return rows[sent_to(rows.device, permutation)]
        size = len(rows)
        owners = permutation // size
        receivers = torch.arange(len(permutation)) // size
        leaving = permutation[owners == self.rank] % size
        to_whom = receivers[owners == self.rank]
        from_whom = owners[receivers == self.rank]
        sent = rows[sent_to(rows.device, leaving)]
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, self._counts(from_whom), self._counts(to_whom))
        arrival = torch.argsort(torch.argsort(from_whom, stable=True))
        return received[sent_to(rows.device, arrival)]

    def _counts(self, ranks: torch.Tensor) -> list[int]:
        counts: list[int] = torch.bincount(ranks, minlength=self.size).tolist()
        return counts


def patient_group(seconds: float) -> distributed.ProcessGroup:
    """A gloo group of all ranks that gives up on one after so long, whatever `limit_waiting` says of the others."""
    timeout = timedelta(seconds=seconds)
    group: distributed.ProcessGroup = distributed.new_group(backend="gloo", timeout=timeout, group_desc=PATIENT)
    return group


def limit_waiting(seconds: float) -> int:
    """Have all but patient groups give up on a rank that does not answer for so long; returns how many these are.

    To be called once all groups are made: one made later, as DeepSpeed's copy of the world is, does not inherit the
    limit that `init_distributed` was given, and without one a cut link is waited for without end.
    """
    made = distributed_c10d._world.pg_map if distributed.is_initialized() else ()
    groups = [group for group in made if group.group_desc != PATIENT]
    for group in groups:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
    return len(groups)


def sent_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor from the CPU, from pinned memory where that keeps the sender from waiting for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
