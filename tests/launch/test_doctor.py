"""`mcl doctor` on hosts of their own, whole and with every fault that it names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launch.doctor_checks import ALL, FAIL, Row
from launch.hostfile import read_hostfile
from mcl_dist.errors import ConfigError
from tests.hosts import Rig, missing, running_hosts

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = str(REPOSITORY / "configs" / "pretrain" / "tiny.yaml")
SECONDS = 120

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def examine(rig: Rig, *words: str, hostfile: Path | None = None) -> tuple[int, list[Row]]:
    command = [sys.executable, "-m", "mcl_dist", "doctor", "--hostfile", str(hostfile or rig.hostfile), "--json"]
    command += ["--ssh-config", str(rig.ssh_config), *words]
    process = rig.head.popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = process.communicate(timeout=SECONDS)
    assert output, errors
    return process.returncode, [Row(**row) for row in json.loads(output)]


def failing(rows: Sequence[Row], check: str) -> dict[str, str]:
    """What is found and what to do, by node."""
    found = [row for row in rows if row.check == check and row.state == FAIL]
    assert all(row.remedy for row in found)
    return {
        node: "\n".join(f"{row.found}; {row.remedy}" for row in found if row.node == node)
        for node in {row.node for row in found}
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_hosts(tmp_path_factory.mktemp("doctor") / "rig") as rig:
        yield rig


def test_two_whole_hosts_pass_and_nothing_of_it_stays(whole: Rig, synthetic_shards: Path) -> None:
    run = whole.work / "run"
    settings = [f"data.train={synthetic_shards}", f"run.dir={run}", f"data.cache={whole.own}", "monitoring.port=9400"]
    code, found = examine(whole, "--config", CONFIG, *settings)
    assert [row for row in found if row.state == FAIL] == []
    assert code == 0
    said = {row.check: row for row in found}
    assert "2 ranks by gloo" in said["all-reduce"].found
    assert said["shared checkpoints"].node == said["data"].node == ALL
    assert "another folder on each node" in said["shared cache"].found
    assert not list(whole.work.rglob("*mcl-doctor*"))
    assert not any(host.processes() for host in whole.hosts)


def test_a_slow_link_is_measured_and_told(whole: Rig) -> None:
    whole[1].run("tc qdisc add dev eth0 root tbf rate 300mbit burst 64kb latency 50ms")
    code, found = examine(whole)
    whole[1].run("tc qdisc del dev eth0 root")
    assert code == 1
    assert "MB/s; check the links' speed" in failing(found, "all-reduce")[ALL]


CLOCK = "import time; true = time.time; time.time = lambda: true() + 90\n"
IMAGINARY_GPU = "import torch; torch.cuda.device_count = lambda: 1; torch.cuda.get_device_name = lambda index: 'G1'\n"


def _plant(rig: Rig, shards: Path, folder: Path) -> list[str]:
    """A fault of every kind; the command's words that they show in."""
    first, second, third, fourth = rig.hosts
    for name, text in (("clock", CLOCK), ("gpu", IMAGINARY_GPU)):
        (folder / name).mkdir()
        (folder / name / "sitecustomize.py").write_text(text)
    other_torch = folder / "clock" / "torch-2.7.0.dist-info"
    other_torch.mkdir()
    (other_torch / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.7.0\n")
    (folder / "foreign" / "monitoring").mkdir(parents=True)
    (folder / "foreign" / "monitoring" / "__init__.py").touch()
    for host, name in ((first, "gpu"), (second, "clock"), (third, "foreign")):
        host.environment["PYTHONPATH"] = str(folder / name)
    for host in (first, second, third):
        host.kill()
        host.boot()
    fourth.run("kill $(pgrep -o sshd)")

    first.run("python3 -m http.server --bind 127.0.0.1 9400 >/dev/null 2>&1 </dev/null &")
    first.run("until : >/dev/tcp/127.0.0.1/9400; do sleep 0.05; done 2>/dev/null")
    first.run(f"cp -r {shards} {rig.own}/missing && cp -r {shards} {rig.own}/other")
    second.run(f"cp -r {shards} {rig.own}/other")
    # Sealed anew, as another build would be.
    second.run(
        f"cd {REPOSITORY} && {sys.executable} -c 'from pathlib import Path; from tests.shard_sets import reseal; "
        f'folder = Path("{rig.own}/other"); tar = folder / "shard-000000.tar"; tar.chmod(0o644); '
        f"tar.write_bytes(tar.read_bytes() + bytes(1024)); reseal(folder)'"
    )
    changed = folder / "demo.py"
    changed.write_text((REPOSITORY / "launch" / "demo.py").read_text() + "# changed\n")
    second.run(f"mount --bind {changed} {REPOSITORY}/launch/demo.py")
    (rig.work / "run").mkdir()
    second.run(f"mount --bind {rig.work}/run {rig.work}/run && mount -o remount,bind,ro {rig.work}/run")
    second.run(f"mkdir {rig.own}/cache && mount -t tmpfs -o size=1m none {rig.own}/cache")
    second.run("mount -o remount,size=16m /dev/shm")
    second.run("mount -t tmpfs none /sys/class && mkdir -p /sys/class/infiniband/mlx5_0")
    second.run("prlimit --memlock=65536 --pid $(pgrep -o sshd)")
    (second.folder / "hosts").write_text(rig.hosts_file({"node2": "127.0.1.1"}))
    second.run(f"ip route add blackhole {first.address}")
    sets = f"data.sets=[{{url: {shards}}}, {{url: {rig.own}/missing}}, {{url: {rig.own}/other}}]"
    folders = [f"run.dir={rig.work}/run", f"checkpoint.folder={rig.own}/checkpoints", f"data.cache={rig.own}/cache"]
    return ["--config", CONFIG, sets, *folders, "monitoring.port=9400", "--timeout", "5"]


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory, synthetic_shards: Path) -> Iterator[tuple[Rig, int, list[Row]]]:
    work = tmp_path_factory.mktemp("faults")
    with running_hosts(work / "rig", count=4) as rig:
        words = _plant(rig, synthetic_shards, work)
        hostfile = work / "hosts"
        hostfile.write_text(rig.hostfile.read_text() + "nowhere slots=1\n")
        yield rig, *examine(rig, *words, hostfile=hostfile)


def test_planted_faults_fail_the_table(examined: tuple[Rig, int, list[Row]]) -> None:
    assert examined[1] == 1


@pytest.mark.parametrize(
    ("check", "node", "found", "remedy"),
    [
        ("reached", "node4", "Connection refused", "its sshd reachable"),
        ("reached", "nowhere", "Could not resolve hostname", "address in DNS"),
        ("packages", "node3", "`monitoring` is not ours: ", "PYTHONPATH"),
        ("torch", "node2", "2.7.0, but 2.", "constraints.txt"),
        ("code", "node2", "but", "install the same mcl-dist"),
        ("GPUs", "node2", "none for 1 ranks", "driver"),
        ("clock", "node2", "s ahead of this host's", "NTP"),
        ("name", "node2", "node2 is 127.0.1.1 to itself", "/etc/hosts"),
        ("shared memory", "node2", "16.0 MiB free in /dev/shm", "--shm-size"),
        ("locked memory", "node2", "limit 0.1 MiB beside InfiniBand", "unlimited"),
        ("ports", "node1", "9400 taken", "another port"),
        ("data", "node2", "missing/manifest.json: no such file", "credentials"),
        ("run", "node2", "Read-only file system", "writable"),
        ("cache", "node2", "1.0 MiB free", "2.0 GiB or more"),
        ("shared checkpoints", "node2", "is not that of node1", "shared file system"),
        ("all-reduce", "node2", "", "GLOO_SOCKET_IFNAME"),
    ],
)
def test_a_fault_is_named_with_its_node_and_remedy(
    examined: tuple[Rig, int, list[Row]], check: str, node: str, found: str, remedy: str
) -> None:
    told = failing(examined[2], check)[node]
    assert found in told
    assert remedy in told


def test_a_set_that_differs_from_node_to_node_is_told(examined: tuple[Rig, int, list[Row]]) -> None:
    (row,) = (row for row in examined[2] if row.check == "data" and "(manifest" in row.found)
    assert (row.node, row.state) == ("node2", FAIL)
    assert "copy the same set" in row.remedy


def test_whole_nodes_are_not_blamed(examined: tuple[Rig, int, list[Row]]) -> None:
    blamed = {row.check for row in examined[2] if row.state == FAIL and row.node == "node1"}
    assert blamed <= {"ports", "shared checkpoints", "all-reduce"}


def test_a_foreign_launch_package_is_named_by_the_command_itself(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from mcl_dist.__main__ import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"mcl: `launch` is not ours: {tmp_path}/launch/__init__.py hides ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 slots=2\nnode1 slots=2\n", "line 2: node1 is named twice"),
        ("# hosts\nnode1\n", "line 2: found 'node1'"),
        ("node1 slots=0\n", "line 1: found 'node1 slots=0'"),
        ("-oProxyCommand=x slots=1\n", "line 1: found '-oProxyCommand"),
        ("\n# none\n", "names no host"),
    ],
)
def test_a_hostfile_that_cannot_be_meant_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_hostfile(str(hostfile))


def test_a_hostfile_names_hosts_with_their_slots(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=8  # the first\n\nuser@node2   slots=4\n")
    assert [(host.name, host.address, host.slots) for host in read_hostfile(str(hostfile))] == [
        ("node1", "node1", 8),
        ("user@node2", "node2", 4),
    ]
