"""FLOPs of a training step, counted without executing it."""

from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.objective.momentum_encoder import NUM_KEYS, Keys
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.objective.objective import LossWeights, Objective


def flops_per_video(encoder: EncoderConfig, heads: HeadsConfig, frames: int, crop: int) -> int:
    """Floating-point operations of a step for one video: convolutions and matrix products; a multiply-add counts as 2.

    A step is three keys forward, the query forward with its losses and the alignment's gradient in closed form, and
    the backward. Activation checkpointing counts once; the pass over the negatives, under a thousandth, is omitted.
    """
    plain = replace(encoder, checkpointing=False, batch_norm="local")
    with FakeTensorMode():  # shapes only: no memory, no computation
        network = Network(plain, heads)
        clips = torch.empty(1, 3, frames, crop, crop)
        with torch.no_grad(), FlopCounterMode(display=False) as key_counter:
            network(clips)
        vectors = torch.empty(NUM_KEYS, 1, heads.dim)
        with FlopCounterMode(display=False) as query_counter:
            loss = Objective(network, temperature=1.0)(
                clips,
                Keys(vectors, vectors, vectors, vectors),
                NegativeQueue(torch.empty(1, heads.dim)),
                torch.empty(1, *encoder.grid(frames, crop)),
                torch.zeros(1, dtype=torch.long),
                LossWeights(1.0, 1.0, 1.0),
            )
            loss.backward()
    return int(NUM_KEYS * key_counter.get_total_flops() + query_counter.get_total_flops())
