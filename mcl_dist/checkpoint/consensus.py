"""What the ranks' writers tell one another, in a process group of their own: training goes on in the others."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from mcl_dist.distributed.process_group import ProcessGroup, patient_group
from mcl_dist.errors import UserError


class Consensus:
    """The writers of all ranks; made by all together, whatever the backend of training.

    Args:
        seconds: after which a rank that says nothing is given up.
    """

    def __init__(self, group: ProcessGroup, seconds: float) -> None:
        self.group = group
        self._group = patient_group(seconds) if group.size > 1 else None

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Do something on every rank, and learn how all of them fared; all must call it together.

        Args:
            work: its result must be what JSON can say.

        Returns:
            The results of all ranks, in their order.

        Raises:
            UserError: on every rank alike, when it failed on one of them.
        """
        words = self._gather(_told(work))
        for rank, word in enumerate(words):
            if "error" in word:
                raise UserError(word["error"] if self.group.size == 1 else f"rank {rank}: {word['error']}")
        return [word["result"] for word in words]

    def _gather(self, word: dict[str, Any]) -> list[dict[str, Any]]:
        if self._group is None:
            return [word]
        said = torch.frombuffer(bytearray(json.dumps(word).encode()), dtype=torch.uint8)
        try:
            sizes = self._gathered(torch.tensor([len(said)]))
            longest = int(torch.cat(sizes).max())
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(said)] = said
            heard = self._gathered(padded)
        except RuntimeError as error:
            raise UserError(f"a rank has gone or was silent for too long ({str(error).splitlines()[0]})") from error
        return [json.loads(bytes(row[: int(size)].numpy())) for row, size in zip(heard, sizes, strict=True)]

    def _gathered(self, values: torch.Tensor) -> list[torch.Tensor]:
        rows = [torch.empty_like(values) for _ in range(self.group.size)]
        distributed.all_gather(rows, values, group=self._group)
        return rows


def _told(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": work()}
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:  # a rank that left without a word would keep the others waiting
        logging.getLogger(__name__).exception("a mistake of this program")
        return {"error": f"{type(error).__name__}: {error}"}
