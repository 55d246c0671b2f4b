"""The checks of `mcl doctor`: from the facts that nodes report to the rows of its table."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

OK, NOTE, FAIL = "ok", "note", "FAIL"
ALL = "all"  # in place of a node's name
MAX_CLOCK_SECONDS = 1.0  # between nodes, so that their logs can be read side by side
DISK_BYTES = 2 * 2**30  # a few checkpoints of the full-size model
SHARED_MEMORY_BYTES = 128 * 2**20  # containers have 64 MiB by default, too little for NCCL and DALI
LOCKED_MEMORY_BYTES = 2**30  # that InfiniBand's buffers may need; hosts set up for InfiniBand have no limit
LINK_BYTES_PER_SECOND = 100e6  # of Ethernet at 1 Gbit/s


class CheckResult(NamedTuple):
    """One row of the table; `remedy` is empty unless `state` is FAIL."""

    check: str
    node: str
    state: str
    found: str
    remedy: str = ""


NodeFacts = dict[str, Any]
Nodes = Mapping[str, NodeFacts]


def check_nodes(
    nodes: Nodes, slots: Mapping[str, int], clock_bounds: Mapping[str, tuple[float, float]]
) -> Iterator[CheckResult]:
    """Check the facts that `launch.cluster.doctor_node` found on each node, alone and against the first node.

    Without a hostfile, there are no slots. The bounds are those of each node's clock minus ours, in seconds.
    """
    yield from _packages(nodes)
    yield from _versions(nodes)
    yield from _same("code", nodes, lambda facts: facts["code"], "install the same mcl-dist on every node")
    yield from _torch(nodes)
    yield from _gpus({name: facts for name, facts in nodes.items() if not facts["torch_error"]}, slots)
    yield from _clocks(clock_bounds)
    if len(nodes) > 1:
        yield from _each("name", nodes, _own_name)
    yield from _each("shared memory", nodes, _shared_memory)
    yield from _each("locked memory", nodes, _locked_memory)
    yield from _each("ports", nodes, _ports)
    yield from _sets(nodes)
    yield from _folders(nodes)


def _each(check: str, nodes: Nodes, examine: Callable[[NodeFacts], tuple[str, str]]) -> Iterator[CheckResult]:
    """A row for each node that fails, and one for each finding that several nodes share.

    `examine` returns what was found and the remedy, which is empty if all is well.
    """
    findings = {name: examine(facts) for name, facts in nodes.items()}
    for name, (found, remedy) in findings.items():
        if remedy:
            yield CheckResult(check, name, FAIL, found, remedy)
    for found in dict.fromkeys(found for found, remedy in findings.values() if not remedy and found):
        alike = [name for name, finding in findings.items() if finding[0] == found]
        yield CheckResult(check, ALL if len(alike) == len(nodes) else ", ".join(alike), OK, found)


def _same(check: str, nodes: Nodes, value_of: Callable[[NodeFacts], str], remedy: str) -> Iterator[CheckResult]:
    """A row for each node whose value is not that of the first; one row for all if there is none."""
    first = next(iter(nodes))
    expected = value_of(nodes[first])
    others = {name: found for name, facts in nodes.items() if (found := value_of(facts)) != expected}
    for name, found in others.items():
        yield CheckResult(check, name, FAIL, f"{found}, but {expected} on {first}", remedy)
    if not others:
        yield CheckResult(check, ALL, OK, expected)


def _packages(nodes: Nodes) -> Iterator[CheckResult]:
    for name, facts in nodes.items():
        for package, path in facts["foreign"].items():
            remedy = "install mcl-dist into this Python"
            if path != "nothing":
                places = "PYTHONPATH and the working folder"
                remedy = f"remove it from {places}, or install mcl-dist in an environment of its own"
            yield CheckResult("packages", name, FAIL, f"`{package}` is not ours: {path}", remedy)
    if not any(facts["foreign"] for facts in nodes.values()):
        yield CheckResult("packages", ALL, OK, "ours are found")


def _versions(nodes: Nodes) -> Iterator[CheckResult]:
    libraries = dict.fromkeys(library for facts in nodes.values() for library in facts["versions"])
    has_failed = False
    for library in libraries:
        remedy = f"install the same {library} on every node, with constraints.txt"
        for row in _same(library, nodes, partial(_version, library), remedy):
            if row.state == FAIL:
                has_failed = True
                yield row
            elif row.found == "missing":
                has_failed = True
                yield CheckResult(library, ALL, FAIL, "missing", "install mcl-dist with its extra cuda13 or cuda12")
    if not has_failed:
        versions = next(iter(nodes.values()))["versions"]
        found = ", ".join(f"{library} {version}" for library, version in versions.items())
        yield CheckResult("versions", ALL, OK, found)


def _version(library: str, facts: NodeFacts) -> str:
    return str(facts["versions"].get(library, "missing"))


def _torch(nodes: Nodes) -> Iterator[CheckResult]:
    for name, facts in nodes.items():
        if facts["torch_error"]:
            until = "until then, data, GPUs and links of this node are not checked"
            remedy = f"reinstall torch in this Python (make install); {until}"
            yield CheckResult("import torch", name, FAIL, facts["torch_error"], remedy)


def _gpus(nodes: Nodes, slots: Mapping[str, int]) -> Iterator[CheckResult]:
    if nodes and not any(facts["gpus"] for facts in nodes.values()):
        yield CheckResult("GPUs", ALL, NOTE, "none: ranks run on CPUs")
        return
    remedy = "check the driver (nvidia-smi), CUDA_VISIBLE_DEVICES and that this torch is a CUDA build"

    def examine(facts: NodeFacts) -> tuple[str, str]:
        gpus = facts["gpus"]
        found = ", ".join(f"{gpus.count(model)}× {model}" for model in dict.fromkeys(gpus)) or "none"
        num_ranks = slots.get(facts["node"], 1)
        return (found, "") if len(gpus) >= num_ranks else (f"{found} for {num_ranks} ranks", remedy)

    yield from _each("GPUs", {name: facts | {"node": name} for name, facts in nodes.items()}, examine)


def _clocks(bounds: Mapping[str, tuple[float, float]]) -> Iterator[CheckResult]:
    has_failed = False
    for name, (low, high) in bounds.items():
        offset = low if low > 0 else min(high, 0.0)
        if abs(offset) > MAX_CLOCK_SECONDS:
            has_failed = True
            found = f"at least {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} this host's"
            yield CheckResult("clock", name, FAIL, found, "set it by NTP (chrony, systemd-timesyncd)")
    if bounds and not has_failed:
        limit = max(max(abs(low), abs(high)) for low, high in bounds.values())
        yield CheckResult("clock", ALL, OK, f"within {limit:.1f} s of this host's")


def _own_name(facts: NodeFacts) -> tuple[str, str]:
    address = facts["address"]
    if address is None:
        return f"{facts['hostname']} has no address", "name it in /etc/hosts with its address on the nodes' network"
    if address.startswith("127."):
        remedy = "give it its network address in /etc/hosts, or set GLOO_SOCKET_IFNAME to the network's interface"
        return f"{facts['hostname']} resolves to {address} on itself, and gloo listens there", remedy
    return "each resolves its own name", ""


def _shared_memory(facts: NodeFacts) -> tuple[str, str]:
    if (free := facts["shared_memory_bytes"]) < SHARED_MEMORY_BYTES:
        ways = "--shm-size of docker, an emptyDir of medium Memory, or free some"
        return f"{size(free)} free in /dev/shm", f"{size(SHARED_MEMORY_BYTES)} or more: {ways}"
    return "enough in /dev/shm", ""


def _locked_memory(facts: NodeFacts) -> tuple[str, str]:
    limit = facts["locked_memory_bytes"]
    if not facts["infiniband"]:
        return "not needed without InfiniBand", ""
    if 0 <= limit < LOCKED_MEMORY_BYTES:
        remedy = "ulimit -l unlimited: in limits.conf, the unit or the container"
        return f"limit {size(limit)}, too low for InfiniBand", remedy
    return "enough for InfiniBand", ""


def _ports(facts: NodeFacts) -> tuple[str, str]:
    if closed := facts["closed_ports"]:
        found = ", ".join(f"{address} {reason}" for address, reason in closed.items())
        return found, "end what listens there, or choose an address of this node and a port that is free on all"
    return "free", ""


def _sets(nodes: Nodes) -> Iterator[CheckResult]:
    for index in range(max(len(facts["sets"]) for facts in nodes.values())):
        sets = {name: facts["sets"][index] for name, facts in nodes.items() if facts["sets"]}

        def examine(shard_set: NodeFacts) -> tuple[str, str]:
            error = shard_set["error"]
            remedy = "make it readable from this node: mount it there, or give the node its credentials"
            return (error, remedy) if error else (f"{shard_set['url']} is readable", "")

        yield from _each("data", sets, examine)
        usable = {name: shard_set for name, shard_set in sets.items() if not shard_set["error"]}
        if len({shard_set["digest"] for shard_set in usable.values()}) > 1:
            remedy = "copy the same set to every node, or name one that all share"
            yield from _same("data", usable, lambda found: f"{found['url']} (manifest {found['digest']})", remedy)


def _folders(nodes: Nodes) -> Iterator[CheckResult]:
    for name in dict.fromkeys(name for facts in nodes.values() for name in facts["folders"]):
        yield from _each(name, nodes, partial(_folder, name))


def _folder(name: str, facts: NodeFacts) -> tuple[str, str]:
    if (folder := facts["folders"].get(name)) is None:
        return "", ""
    if folder["error"]:
        return folder["error"], "make it writable for this user on this node, or choose another folder"
    free = folder["free_bytes"]
    if free is not None and free < DISK_BYTES:
        return f"{folder['url']}: {size(free)} free", f"free some: {size(DISK_BYTES)} or more are needed"
    return f"{folder['url']}: written and read back", ""


def check_shared_folders(
    visible: Mapping[str, Mapping[str, Iterable[str]]], paths: Mapping[str, str]
) -> Iterator[CheckResult]:
    """Check whether each local folder is the same on all nodes.

    `visible` has, by node and folder, the nodes whose files it sees there; `paths` are the folders, by their use.
    """
    for folder, path in paths.items():
        unseen = {node: sorted(set(visible) - set(folders.get(folder, ()))) for node, folders in visible.items()}
        apart = [node for node, others in unseen.items() if others]
        check = f"shared {folder}"
        if not apart:
            yield CheckResult(check, ALL, NOTE if folder == "cache" else OK, f"{path} is one folder for all")
        elif folder == "checkpoints":
            remedy = "put checkpoint.folder on a shared file system or in a store"
            for node in apart:
                yield CheckResult(check, node, FAIL, f"{path} is not the folder of {', '.join(unseen[node])}", remedy)
        else:
            yield CheckResult(check, ALL, NOTE, f"{path} is another folder on each node")


def check_all_reduce(answers: Mapping[str, list[NodeFacts]], num_ranks: int, on_gpus: bool) -> Iterator[CheckResult]:
    """Check the result of the all-reduce: the answers of the ranks that ended, by node; `num_ranks` should have."""
    backend, variable = ("NCCL", "NCCL_SOCKET_IFNAME") if on_gpus else ("gloo", "GLOO_SOCKET_IFNAME")
    for node, ranks in answers.items():
        errors = [rank["error"] for rank in ranks if rank["error"]]
        if errors or not ranks:
            remedy = f"open all ports between the nodes, and set {variable} to the interface that joins them"
            yield CheckResult("all-reduce", node, FAIL, errors[0] if errors else "no answer", remedy)
    ended = [rank for ranks in answers.values() for rank in ranks]
    if len(ended) < num_ranks or any(rank["error"] for rank in ended):
        return
    if num_ranks == 1:
        yield CheckResult("all-reduce", ALL, OK, f"one rank over {backend}: it starts, and has no peer to measure")
        return
    speed = min((rank["bytes_per_second"] for rank in ended), default=math.inf)
    seconds = max(rank["seconds"] for rank in ended)
    found = f"{num_ranks} ranks over {backend}: 16.0 MiB in {seconds * 1e3:.0f} ms, {speed / 1e6:.0f} MB/s"
    if len(answers) > 1 and speed < LINK_BYTES_PER_SECOND:
        remedy = f"check the links' speed (ethtool) and that {variable} names the fast one; 100 MB/s is 1 Gbit/s"
        yield CheckResult("all-reduce", ALL, FAIL, found, remedy)
    else:
        yield CheckResult("all-reduce", ALL, OK, found)


def size(num_bytes: int) -> str:
    """Format bytes as MiB or GiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
