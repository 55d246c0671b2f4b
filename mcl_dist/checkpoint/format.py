"""Names in a checkpoint's folder, and how far they and their contents may go."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mcl_dist.storage.folder import Folder

FORMAT = 2
COMMITTED = "COMMITTED"
STATE = "state.json"
NETWORK = "network.safetensors"
MOMENTUM = "momentum.safetensors"
STEP_FOLDER = re.compile(r"step-(\d{9})")

# Far beyond what any run writes, and within what a machine can hold: who asks for more means harm.
MAX_RANKS = 2**16
MAX_JSON_BYTES = 2**24
MAX_HEADER_BYTES = 2**24
MAX_FILE_BYTES = 2**34


@dataclass(frozen=True)
class FileDigest:
    """What is known of a file's bytes: how many they are, and their SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


def step_folder(step: int) -> str:
    """Name of the folder that holds the checkpoint of a step."""
    return f"step-{step:09d}"


def step_of(url: str) -> int:
    """The step of a checkpoint's folder.

    Raises:
        ValueError: for another folder.
    """
    match = STEP_FOLDER.fullmatch(url.rpartition("/")[2])
    if match is None:
        raise ValueError(f"{url}: no step-… folder")
    return int(match[1])


def steps_in(folder: Folder) -> list[int]:
    """Steps that have a checkpoint folder, complete or not, in order."""
    matches = (STEP_FOLDER.fullmatch(name) for name in folder.names())
    return sorted(int(match[1]) for match in matches if match)


def optimizer_file(rank: int) -> str:
    """Name of a rank's part of the optimizer's state."""
    return f"optimizer-{rank:05d}.safetensors"


def queue_file(rank: int) -> str:
    """Name of a rank's part of the negatives."""
    return f"queue-{rank:05d}.safetensors"


def statistics_file(rank: int) -> str:
    """Name of a rank's BatchNorm statistics."""
    return f"statistics-{rank:05d}.safetensors"


def file_names(num_ranks: int) -> set[str]:
    """All files that `COMMITTED` seals in a checkpoint that so many ranks wrote: no more, no fewer."""
    of_ranks = {name(rank) for rank in range(num_ranks) for name in (optimizer_file, queue_file, statistics_file)}
    return {STATE, NETWORK, MOMENTUM} | of_ranks
