"""The momentum encoder of the keys, with clips shuffled over the ranks (METHOD.md, section 3)."""

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
Mark = Callable[[str], None]  # called with the name of a phase when a piece of it ends


class Keys(NamedTuple):
    """Unit vectors of the first, second and third keys; constants.

    Attributes:
        inter, intra, order: (3, B, d), this rank's.
        inter_all: (3, B·W, d), all ranks' inter keys, for the queue.
    """

    inter: torch.Tensor
    intra: torch.Tensor
    order: torch.Tensor
    inter_all: torch.Tensor

    def select(self, videos: slice) -> Keys:
        """Keys of some of this rank's videos; `inter_all` stays whole."""
        return Keys(self.inter[:, videos], self.intra[:, videos], self.order[:, videos], self.inter_all)


class MomentumEncoder:
    """The key network: its parameters are a moving average of the query's, its BatchNorm statistics are its own."""

    def __init__(self, network: Network, group: ProcessGroup, *, seed: int, autocast: bool) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).train()
        self._group = group
        self._shuffled = network.encoder.config.batch_norm == "shuffled" and group.size > 1
        self._seed = seed
        self._autocast = autocast

    @torch.no_grad()
    def encode(self, views: torch.Tensor, step: int, mark: Mark = lambda _: None) -> Keys:
        """Keys of this rank's views, uint8 (B, 4, T, H, W, 3); `step` counts from 0.

        Each of the three keys has its own forward. With shuffled BatchNorm, a permutation of (seed, step, key) spreads
        its clips over the ranks, so that BatchNorm statistics do not reveal the query of a key. `mark` is called at the
        end of each piece of the phases `keys` and `exchange`.
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
        """Update every parameter: average ← m·average + (1−m)·parameter.

        Args:
            parameters: the query network's, in the order of `Network.parameters`, whole: gathered if the engine shards
                them.
            momentum: m of this step.
            taken: a scalar on the device, 0 for a skipped step: then the average stays.
        """
        averages: list[torch.Tensor] = list(self.network.parameters())
        changes = list(torch._foreach_sub(list(parameters), averages))
        torch._foreach_mul_(changes, 1 - momentum if taken is None else (1 - momentum) * taken)
        torch._foreach_add_(averages, changes)

    def _encode_shuffled(self, clips: torch.Tensor, step: int, key: int, mark: Mark) -> torch.Tensor:
        """`_encode` with each clip on the rank that the permutation assigns it to.

        Ranks exchange clips as bytes and get vectors back; each sends only its own clips.
        """
        permutation = shuffle_permutation(len(clips) * self._group.size, self._seed, step, key)
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


def shuffle_permutation(num_clips: int, seed: int, step: int, key: int) -> torch.Tensor:
    """Permutation of the global batch's clips for BatchNorm; `key` is 0 to 2."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step * NUM_KEYS + key]))
    return torch.from_numpy(generator.permutation(num_clips))
