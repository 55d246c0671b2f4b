"""A node's part of the all-reduce of `mcl doctor`: a JSON request on standard input, a line of JSON for each rank.

The doctor runs this file by its path.
"""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

NUM_FLOATS = 2**22  # 16 MiB: long enough to fill a link, short enough for a slow one
NUM_ROUNDS = 3


def visible_nodes(folders: dict[str, str], nonce: str) -> dict[str, list[str]]:
    """The nodes whose marker files are visible in each folder."""
    prefix = f".mcl-doctor-{nonce}-"
    return {
        name: sorted(path.name[len(prefix) :] for path in Path(folder).glob(f"{prefix}*"))
        for name, folder in folders.items()
    }


def all_reduce(request: dict[str, Any], local_rank: int) -> dict[str, Any]:
    """Run an all-reduce over all ranks; returns bytes a second through each rank, or the error."""
    import torch
    from torch import distributed

    rank, world_size = request["first_rank"] + local_rank, request["world_size"]
    os.environ |= {"MASTER_ADDR": request["address"], "MASTER_PORT": str(request["port"])}
    if on_gpu := request["on_gpus"]:
        torch.cuda.set_device(local_rank)
    try:
        backend, timeout = "nccl" if on_gpu else "gloo", timedelta(seconds=request["seconds"])
        distributed.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
        values = torch.ones(NUM_FLOATS, device="cuda" if on_gpu else "cpu")
        distributed.all_reduce(values)
        fastest = min(_time_all_reduce(values) for _ in range(NUM_ROUNDS))
    except RuntimeError as error:  # includes torch's errors of stores and process groups
        return {"rank": rank, "error": str(error).splitlines()[0]}
    moved_bytes = 2 * (world_size - 1) / world_size * values.nbytes
    return {"rank": rank, "error": None, "bytes_per_second": moved_bytes / fastest, "seconds": fastest}


def _time_all_reduce(values: Any) -> float:
    from torch import distributed

    start = time.perf_counter()
    distributed.all_reduce(values)
    float(values[0])  # waits for a GPU
    return time.perf_counter() - start


def _print(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")  # one write, since other ranks write there too
    sys.stdout.flush()


def main() -> None:
    """List visible nodes, then run the ranks of this node; a process with a rank on its command line is that rank."""
    sys.path.pop(0)  # our own folder, which Python adds for a program that is run by its path
    request = json.load(sys.stdin)
    if len(sys.argv) > 1:
        _print(all_reduce(request, int(sys.argv[1])))
        os._exit(0)  # tearing down process groups sometimes aborts
    _print({"visible": visible_nodes(request["folders"], request["nonce"])})
    commands = ([sys.executable, __file__, str(rank)] for rank in range(request["ranks"]))
    ranks = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for command in commands]
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write(json.dumps(request))
        rank.stdin.close()
    for rank in ranks:
        rank.wait()


if __name__ == "__main__":
    main()
