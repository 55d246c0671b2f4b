"""Checkpoints without pickle and without a world size.

A checkpoint is a folder `step-000001200/` that all ranks fill:

- `state.json`: format, step, queue position, number of ranks, where the run stood, its schedule and configuration;
- `network.safetensors`, `momentum.safetensors`: parameters of query and key network, float32;
- of every rank `optimizer-00000.safetensors` and `queue-00000.safetensors`, its part of the optimizer's state and of
  the negatives, which together are the whole, and `statistics-00000.safetensors`, its BatchNorm statistics;
- `COMMITTED`: sizes and digests of all of these, written last. A folder without it is torn, and never resumed.

There are no generators in it: every draw of a run is a function of its seed, the step and the sample.
"""

from mcl_dist.checkpoint.format import COMMITTED
from mcl_dist.checkpoint.integrity import DamagedError, TornError
from mcl_dist.checkpoint.manager import CheckpointConfig, CheckpointManager
from mcl_dist.checkpoint.reader import load_encoder, load_network, newest, read_snapshot, resolve, restore
from mcl_dist.checkpoint.state import CheckpointShard, Progress, Snapshot, Tensors

__all__ = [
    "COMMITTED",
    "CheckpointConfig",
    "CheckpointManager",
    "CheckpointShard",
    "DamagedError",
    "Progress",
    "Snapshot",
    "Tensors",
    "TornError",
    "load_encoder",
    "load_network",
    "newest",
    "read_snapshot",
    "resolve",
    "restore",
]
