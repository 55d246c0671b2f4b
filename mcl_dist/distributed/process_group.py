"""The ranks of a run and their collectives."""

from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import distributed_c10d

TEXT_BYTES = 256  # of one rank's text in `gather_texts`
OWN_TIMEOUT = "own timeout"  # description of groups that `set_collective_timeout` leaves alone


class ProcessGroup:
    """This rank among `size` ranks; a single rank when torch.distributed is not initialised.

    Args:
        device: of the tensors that ranks exchange.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        is_distributed = distributed.is_initialized()
        self.rank = distributed.get_rank() if is_distributed else 0
        self.size = distributed.get_world_size() if is_distributed else 1

    @property
    def is_first(self) -> bool:
        """Whether this rank logs and writes for all."""
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
        """A short text of every rank, in rank order, each truncated to `TEXT_BYTES`."""
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
        """All-to-all of rows (W·B, …): block r goes to rank r; the blocks for this rank, in rank order, (W·B, …)."""
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

    def first_text(self, text: str) -> str:
        """The first non-empty text in rank order, with its rank; empty when all are."""
        texts = enumerate(self.gather_texts(text))
        return next((f"{each} at rank {rank}" for rank, each in texts if each), "")

    def permute(self, rows: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
        """Permute the rows of all ranks: global row i of the result is global row `permutation[i]` of the input.

        Each rank sends only its own rows, so its traffic does not grow with the number of ranks.

        Args:
            rows: (B, …), this rank's.
            permutation: int64 (B·W,) on the CPU, the same on every rank.
        """
        if self.size == 1:
            return rows[copy_to_device(rows.device, permutation)]
        size = len(rows)
        owners = permutation // size
        receivers = torch.arange(len(permutation)) // size
        leaving = permutation[owners == self.rank] % size
        destinations = receivers[owners == self.rank]
        origins = owners[receivers == self.rank]
        sent = rows[copy_to_device(rows.device, leaving)]
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, self._counts(origins), self._counts(destinations))
        arrival = torch.argsort(torch.argsort(origins, stable=True))
        return received[copy_to_device(rows.device, arrival)]

    def _counts(self, ranks: torch.Tensor) -> list[int]:
        counts: list[int] = torch.bincount(ranks, minlength=self.size).tolist()
        return counts


def gloo_group_with_timeout(seconds: float) -> distributed.ProcessGroup:
    """A gloo group of all ranks with a timeout of its own, which `set_collective_timeout` does not change."""
    timeout = timedelta(seconds=seconds)
    group: distributed.ProcessGroup = distributed.new_group(backend="gloo", timeout=timeout, group_desc=OWN_TIMEOUT)
    return group


def set_collective_timeout(seconds: float) -> int:
    """Set the timeout of all process groups but those of `gloo_group_with_timeout`; returns their number.

    Call it once all groups exist: a group made later, such as DeepSpeed's copy of the world, does not inherit the
    timeout of `init_distributed`, and without one a collective over a broken link never returns.
    """
    groups = distributed_c10d._world.pg_map if distributed.is_initialized() else ()
    limited = [group for group in groups if group.group_desc != OWN_TIMEOUT]
    for group in limited:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
    return len(limited)


def copy_to_device(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on a device; for a GPU through pinned memory, so that the CPU does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
