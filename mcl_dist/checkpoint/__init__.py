"""Checkpoints without pickle and independent of the number of ranks.

All ranks together write a folder `step-000001200/`:

- `state.json`: format, step, queue position, number of ranks, training progress, schedule and configuration;
- `network.safetensors`, `momentum.safetensors`: parameters of query and key network, float32;
- per rank, `optimizer-00000.safetensors` and `queue-00000.safetensors`: its shard of the optimizer state and of the
  negatives;
- per rank, `statistics-00000.safetensors`: its BatchNorm statistics;
- `COMMITTED`: sizes and digests of all these files, written last. A folder without it is incomplete and never resumed.

No random generator is stored: every draw of a run is a function of its seed, the step and the sample.
"""

from mcl_dist.checkpoint.format import COMMITTED
from mcl_dist.checkpoint.integrity import CorruptCheckpointError, IncompleteCheckpointError
from mcl_dist.checkpoint.manager import CheckpointConfig, CheckpointManager
from mcl_dist.checkpoint.reader import load_encoder, load_network, newest, read_snapshot, resolve, restore
from mcl_dist.checkpoint.state import CheckpointShard, Progress, Snapshot, Tensors

__all__ = [
    "COMMITTED",
    "CheckpointConfig",
    "CheckpointManager",
    "CheckpointShard",
    "CorruptCheckpointError",
    "IncompleteCheckpointError",
    "Progress",
    "Snapshot",
    "Tensors",
    "load_encoder",
    "load_network",
    "newest",
    "read_snapshot",
    "resolve",
    "restore",
]
