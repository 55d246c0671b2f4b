"""The key side: a moving average of the query network, encoding under shuffled BatchNorm (METHOD.md, section 3)."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mcl_dist.batch import FIRST_KEY, NUM_VIEWS
from mcl_dist.encoder import normalise
from mcl_dist.heads import Network
from mcl_dist.ranks import Ranks

NUM_KEYS = NUM_VIEWS - FIRST_KEY


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


class MomentumEncoder:
    """Owns the key network; its parameters follow the query's, its BatchNorm statistics are its own."""

    def __init__(self, network: Network, ranks: Ranks, *, momentum: float, seed: int, autocast: bool) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).train()
        self._ranks = ranks
        self._average = get_ema_multi_avg_fn(momentum)  # type: ignore[no-untyped-call]
        self._seed = seed
        self._autocast = autocast

    @torch.no_grad()
    def encode(self, views: torch.Tensor, step: int) -> Keys:
        """Keys of views uint8 (B, 4, T, H, W, 3).

        Each of the three keys is encoded in a forward of its own, its clips spread over the ranks by a permutation
        that depends on (seed, step, key) alone, so that BatchNorm cannot tell which query a key belongs to.
        """
        per_key = [
            self._encode_shuffled(views[:, FIRST_KEY + key].contiguous(), self._permutation(len(views), step, key))
            for key in range(NUM_KEYS)
        ]
        inter_all, intra_all, order_all = torch.stack(per_key, dim=1)
        start = self._ranks.rank * len(views)
        own = slice(start, start + len(views))
        return Keys(inter_all[:, own], intra_all[:, own], order_all[:, own], inter_all)

    @torch.no_grad()
    def update(self, network: Network) -> None:
        """Move every parameter towards the query's: average ← m·average + (1−m)·parameter."""
        self._average(list(self.network.parameters()), list(network.parameters()), 0)

    def _encode_shuffled(self, clips: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
        """Inter, intra and order vectors of all ranks' clips, in the order before shuffling: (3, B·W, d)."""
        shuffled = normalise(self._ranks.permute(clips, permutation))
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=self._autocast):
            output = self.network(shuffled.to(next(self.network.parameters()).dtype))
        vectors = torch.stack([output.inter.vector, output.intra.vector, output.order.vector], dim=1)
        gathered = self._ranks.gather(vectors)
        restored = torch.empty_like(gathered)
        restored[permutation.to(gathered.device)] = gathered
        return restored.movedim(1, 0)

    def _permutation(self, batch: int, step: int, key: int) -> torch.Tensor:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, step * NUM_KEYS + key]))
        return torch.from_numpy(generator.permutation(batch * self._ranks.count))
