"""The key side: a moving average of the query network, its clips shuffled over the ranks (METHOD.md, section 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from mcl_dist.batch import FIRST_KEY, NUM_VIEWS
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.model.encoder import normalise
from mcl_dist.model.network import Network

NUM_KEYS = NUM_VIEWS - FIRST_KEY
Mark = Callable[[str], None]  # called with a phase's name when a piece of it ends


class Keys(NamedTuple):
    """Unit vectors of first, second and third key, constants.

    Attributes:
        inter, intra, order: (3, B, d), this rank's.
        inter_all: (3, B·W, d), those of all ranks, for the queue.
    """

    inter: torch.Tensor
    intra: torch.Tensor
    order: torch.Tensor
    inter_all: torch.Tensor

    def of(self, videos: slice) -> Keys:
        """Those of some of this rank's videos; the queue's are all ranks' still."""
        return Keys(self.inter[:, videos], self.intra[:, videos], self.order[:, videos], self.inter_all)


class MomentumEncoder:
    """Owns the key network; its parameters follow the query's, its BatchNorm statistics are its own."""

    def __init__(self, network: Network, group: ProcessGroup, *, seed: int, autocast: bool) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).train()
        self._group = group
        self._shuffled = network.encoder.config.batch_norm == "shuffled" and group.size > 1
        self._seed = seed
        self._autocast = autocast

    @torch.no_grad()
    def encode(self, views: torch.Tensor, step: int, mark: Mark = lambda _: None) -> Keys:
        """Keys of views uint8 (B, 4, T, H, W, 3).

        Each of the three keys is encoded in a forward of its own. With shuffled BatchNorm its clips are spread over the
        ranks by a permutation that depends on (seed, step, key) alone, so that BatchNorm cannot tell which query a key
        belongs to.

        Args:
            views: of this rank.
            step: counted from 0.
            mark: called where pieces of the phases `keys` and `exchange` end.
        """
        encode = self._encode_shuffled if self._shuffled else self._encode
        clips = (views[:, FIRST_KEY + key].contiguous() for key in range(NUM_KEYS))
        vectors = torch.stack([encode(each, step, key, mark) for key, each in enumerate(clips)])
        inter, intra, order = vectors.unbind(dim=2)
        inter_all = self._group.gather(inter.transpose(0, 1)).transpose(0, 1)
        mark("exchange")
        return Keys(inter, intra, order, inter_all)

    @torch.no_grad()
    def update(self, parameters: Iterable[torch.Tensor], momentum: float, taken: torch.Tensor | None = None) -> None:
        """Move every parameter towards the query's: average ← m·average + (1−m)·parameter.

        Args:
            parameters: the query network's, whole, in the order of `Network.parameters`: where the engine shards them,
                it has to gather them first.
            momentum: m of this step.
            taken: a scalar on the device, 0 where the step is skipped: the average then stays.
        """
        averages: list[torch.Tensor] = list(self.network.parameters())
        steps = list(torch._foreach_sub(list(parameters), averages))
        torch._foreach_mul_(steps, 1 - momentum if taken is None else (1 - momentum) * taken)
        torch._foreach_add_(averages, steps)

    def _encode_shuffled(self, clips: torch.Tensor, step: int, key: int, mark: Mark) -> torch.Tensor:
        """As `_encode`, each clip on the rank that the permutation takes it to.

        Clips travel as bytes and come back as vectors: a rank sends no more than what it has.
        """
        permutation = self._permutation(len(clips), step, key)
        clips = self._group.permute(clips, permutation)
        mark("exchange")
        vectors = self._group.permute(self._encode(clips, step, key, mark), torch.argsort(permutation))
        mark("exchange")
        return vectors

    def _encode(self, clips: torch.Tensor, _step: int, _key: int, mark: Mark) -> torch.Tensor:
        """Inter, intra and order vectors (B, 3, d) of clips uint8 (B, T, H, W, 3)."""
        inputs = normalise(clips).to(next(self.network.parameters()).dtype)
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=self._autocast):
            output = self.network(inputs)
        vectors = torch.stack([output.inter.vector, output.intra.vector, output.order.vector], dim=1)
        mark("keys")
        return vectors

    def _permutation(self, batch: int, step: int, key: int) -> torch.Tensor:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, step * NUM_KEYS + key]))
        return torch.from_numpy(generator.permutation(batch * self._group.size))
