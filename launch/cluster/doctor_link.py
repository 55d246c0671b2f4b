"""A node's part of an all-reduce between nodes, for `mcl doctor`: a request as JSON on its input, a line a rank out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

NUM_FLOATS = 2**22  # 16 MiB: long enough to fill a link, short enough for a slow one
ROUNDS = 3


def seen(folders: dict[str, str], nonce: str) -> dict[str, list[str]]:
    """Which nodes' files lie in each folder, as this node sees it."""
    start = f".mcl-doctor-{nonce}-"
    return {
        name: sorted(path.name[len(start) :] for path in Path(folder).glob(f"{start}*"))
        for name, folder in folders.items()
    }


def all_reduce(request: dict[str, Any], local_rank: int) -> dict[str, Any]:
    """Bytes a second that an all-reduce between all ranks moves through each of them, or why it does not."""
    import torch
    from torch import distributed

    rank, world = request["first_rank"] + local_rank, request["world"]
    os.environ |= {"MASTER_ADDR": request["address"], "MASTER_PORT": str(request["port"])}
    if on_gpu := request["on_gpus"]:
        torch.cuda.set_device(local_rank)
    try:
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=request["seconds"]),
        )
        values = torch.ones(NUM_FLOATS, device="cuda" if on_gpu else "cpu")
        distributed.all_reduce(values)
        fastest = min(_seconds(distributed, values) for _ in range(ROUNDS))
    except RuntimeError as error:  # among them torch's own errors of stores and process groups
        return {"rank": rank, "error": str(error).splitlines()[0]}
    moved = 2 * (world - 1) / world * values.nbytes
    return {"rank": rank, "error": None, "bytes_per_second": moved / fastest, "seconds": fastest}


def _seconds(distributed: Any, values: Any) -> float:
    start = time.perf_counter()
    distributed.all_reduce(values)
    float(values[0])  # waits for a GPU
    return time.perf_counter() - start


def _tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")  # in one piece: other ranks write there too
    sys.stdout.flush()


def main() -> None:
    """Look, then take part with as many ranks as asked for."""
    sys.path.pop(0)  # our own folder, which Python puts there for a program run by its path
    request = json.load(sys.stdin)
    if len(sys.argv) > 1:
        _tell(all_reduce(request, int(sys.argv[1])))
        os._exit(0)  # tearing process groups down aborts now and then
    _tell({"seen": seen(request["folders"], request["nonce"])})
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank)], stdin=subprocess.PIPE, text=True)
        for rank in range(request["ranks"])
    ]
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write(json.dumps(request))
        rank.stdin.close()
    for rank in ranks:
        rank.wait()


if __name__ == "__main__":
    main()
