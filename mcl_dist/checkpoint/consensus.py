"""Agreement among the writing threads of all ranks, in a process group separate from training's."""

import json
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from mcl_dist.distributed.process_group import ProcessGroup, gloo_group_with_timeout
from mcl_dist.errors import UserError


class Consensus:
    """Runs work on all ranks and shares the outcome; all ranks construct it together, whatever training's backend.

    A rank that does not answer for `timeout` seconds counts as lost. `gloo_group` is PyTorch's process group for the
    messages; None for a single rank.
    """

    def __init__(self, group: ProcessGroup, timeout: float) -> None:
        self.group = group
        self.gloo_group = gloo_group_with_timeout(timeout) if group.size > 1 else None

    def run_on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
        """Run `work` on every rank and gather the results, which JSON can represent, in rank order; a collective call.

        Raises:
            UserError: on every rank alike, if the work failed on any rank.
        """
        outcomes = self._all_gather(_outcome(work))
        for rank, outcome in enumerate(outcomes):
            if "error" in outcome:
                raise UserError(outcome["error"] if self.group.size == 1 else f"rank {rank}: {outcome['error']}")
        return [outcome["result"] for outcome in outcomes]

    def _all_gather(self, outcome: dict[str, Any]) -> list[dict[str, Any]]:
        if self.gloo_group is None:
            return [outcome]
        message = torch.frombuffer(bytearray(json.dumps(outcome).encode()), dtype=torch.uint8)
        try:
            sizes = self._all_gather_tensor(torch.tensor([len(message)]))
            padded = torch.zeros(int(torch.cat(sizes).max()), dtype=torch.uint8)
            padded[: len(message)] = message
            rows = self._all_gather_tensor(padded)
        except RuntimeError as error:
            raise UserError(f"a rank has exited or did not answer in time ({str(error).splitlines()[0]})") from error
        return [json.loads(bytes(row[: int(size)].numpy())) for row, size in zip(rows, sizes, strict=True)]

    def _all_gather_tensor(self, values: torch.Tensor) -> list[torch.Tensor]:
        rows = [torch.empty_like(values) for _ in range(self.group.size)]
        distributed.all_gather(rows, values, group=self.gloo_group)
        return rows


def _outcome(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": work()}
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:  # without an answer from this rank, the others would wait until the timeout
        logging.getLogger(__name__).exception("internal error while writing a checkpoint")
        return {"error": f"{type(error).__name__}: {error}"}
