"""File names in a checkpoint folder, and upper limits for their contents."""

import re
from dataclasses import dataclass

from mcl_dist.storage.folder import Folder

FORMAT = 2
COMMITTED = "COMMITTED"
STATE = "state.json"
NETWORK = "network.safetensors"
MOMENTUM = "momentum.safetensors"
STEP_FOLDER = re.compile(r"step-(\d{9})")

# Far above what any run writes, and within a machine's memory: larger values in a file are treated as an attack.
MAX_RANKS = 2**16
MAX_JSON_BYTES = 2**24
MAX_HEADER_BYTES = 2**24
MAX_FILE_BYTES = 2**34


@dataclass(frozen=True)
class FileDigest:
    """A file's size in bytes and its hexadecimal SHA-256."""

    bytes: int
    sha256: str


def step_folder(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:09d}"


def step_of(url: str) -> int:
    """The step of a checkpoint folder.

    Raises:
        ValueError: the URL does not end in `step-…`.
    """
    match = STEP_FOLDER.fullmatch(url.rpartition("/")[2])
    if match is None:
        raise ValueError(f"{url}: not a step-… folder")
    return int(match[1])


def steps_in(folder: Folder) -> list[int]:
    """Steps with a checkpoint folder, complete or not, in ascending order."""
    matches = (STEP_FOLDER.fullmatch(name) for name in folder.names())
    return sorted(int(match[1]) for match in matches if match)


def rank_file(kind: str, rank: int) -> str:
    """File name of a rank's `optimizer` state, shard of the negatives (`queue`) or BatchNorm `statistics`."""
    return f"{kind}-{rank:05d}.safetensors"


def file_names(num_ranks: int) -> set[str]:
    """The exact set of files that `COMMITTED` lists in a checkpoint written by `num_ranks` ranks."""
    per_rank = {rank_file(kind, rank) for rank in range(num_ranks) for kind in ("optimizer", "queue", "statistics")}
    return {STATE, NETWORK, MOMENTUM} | per_rank
