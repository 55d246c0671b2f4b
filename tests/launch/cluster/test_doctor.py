"""`mcl doctor` on hosts of their own, whole and with every fault that it names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from launch.cli.doctor import LOOK_SECONDS
from launch.cluster.doctor_checks import ALL, FAIL, OK, Row, link
from launch.cluster.doctor_node import DALI
from launch.cluster.hostfile import read_hostfile
from mcl_dist.errors import ConfigError
from tests.support.hosts import Host, Rig, missing, running_hosts
from tests.support.paths import REPOSITORY

CONFIG = str(REPOSITORY / "configs" / "pretrain" / "tiny.yaml")
SECONDS = 120

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def examine(
    rig: Rig, *words: str, hostfile: Path | None = None, look_seconds: int = LOOK_SECONDS
) -> tuple[int, list[Row]]:
    code = f"import sys; from launch import cli, doctor; doctor.LOOK_SECONDS = {look_seconds}; sys.exit(cli.main())"
    command = [sys.executable, "-c", code, "doctor", "--hostfile", str(hostfile or rig.hostfile), "--json"]
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


def test_a_rank_that_is_alone_is_told_no_speed() -> None:
    (row,) = link({"here": [{"error": "", "seconds": 0.0, "bytes_per_second": 0.0}]}, world=1, on_gpus=False)
    assert (row.state, row.found) == (OK, "one rank by gloo: it starts, and has nobody to send to")


def test_a_node_without_this_folder_or_a_key_or_an_answer_is_told_with_what_to_do(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    work = tmp_path_factory.mktemp("unreached")
    (work / "sitecustomize.py").write_text("import time; time.sleep(1e6)\n")
    with running_hosts(work / "rig", count=4) as rig:
        closed, other, bare, hanging = rig.hosts
        closed.run(f"mount --bind /dev/null {rig.work}/user_key.pub")
        known = rig.work / "known_hosts"
        known.write_text(known.read_text().replace(_key_of(other), _key_of(bare)))
        bare.run(f"mount -t tmpfs none {REPOSITORY}")
        hanging.environment["PYTHONPATH"] = str(work)
        hanging.kill()
        hanging.boot()
        code, rows = examine(rig, look_seconds=2)
    assert code == 1
    told = failing(rows, "reached")
    for host, found, remedy in (
        (closed, "Permission denied", "authorise your key there (ssh-copy-id node1)"),
        (other, "Host key verification failed", "ssh-keyscan node2"),
        (bare, "No such file or directory", sys.executable),
        (hanging, "no answer within 2 s", "see what holds it up"),
    ):
        assert found in told[host.name]
        assert remedy in told[host.name]


def _key_of(host: Host) -> str:
    return (host.folder / "host_key.pub").read_text().split()[1]


# Takes what it is sent but from 10.77.0.1, whom it forbids to write; 10.77.0.2 reads other bytes than it wrote.
STORE = """
import http.server
objects = {}
class Store(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)
    def do_PUT(self):
        objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        forbidden = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.answer(403, forbidden) if self.client_address[0] == "10.77.0.1" else self.answer(200)
    def do_GET(self):
        self.answer(200, objects[self.path][::-1]) if self.path in objects else self.answer(404)
    do_HEAD = do_GET
    def do_POST(self):
        self.answer(200, b"<DeleteResult></DeleteResult>")
    do_DELETE = do_POST
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("10.77.0.254", 9000), Store).serve_forever()
"""


def test_a_store_that_cannot_be_written_from_a_node_and_a_node_that_does_not_take_part_are_told(
    whole: Rig, synthetic_shards: Path
) -> None:
    access = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for host in whole.hosts:
        host.environment |= {**access, "AWS_ENDPOINT_URL": "http://10.77.0.254:9000"}
        host.kill()
        host.boot()
    whole[1].run(f"mount --bind /dev/null {REPOSITORY}/launch/cluster/doctor_link.py")
    store = whole.head.popen([sys.executable, "-c", STORE])
    try:
        whole.head.run("until : >/dev/tcp/10.77.0.254/9000; do sleep 0.05; done 2>/dev/null")
        settings = [f"data.train={synthetic_shards}", f"run.dir={whole.work}/run", "checkpoint.folder=s3://bucket/run"]
        code, rows = examine(whole, "--config", CONFIG, *settings, "--timeout", "3")
    finally:
        store.kill()
        store.wait()
    assert code == 1
    told = failing(rows, "checkpoints")
    assert "s3://bucket/run" in told["node1"]
    assert "permission denied" in told["node1"]
    assert "make it writable for this user on this node" in told["node1"]
    assert "reads back other bytes than were written" in told["node2"]
    assert "no answer; open all ports" in failing(rows, "all-reduce")["node2"]


CLOCK = "import time; true = time.time; time.time = lambda: true() + 90\n"
LATE = CLOCK.replace("+", "-")
IMAGINARY_GPU = "import torch; torch.cuda.device_count = lambda: 1; torch.cuda.get_device_name = lambda index: 'G1'\n"


def _plant(rig: Rig, shards: Path, folder: Path) -> list[str]:
    """A fault of every kind; the command's words that they show in."""
    first, second, third, fourth, fifth = rig.hosts
    for name, text in (("clock", CLOCK), ("gpu", IMAGINARY_GPU)):
        (folder / name).mkdir()
        (folder / name / "sitecustomize.py").write_text(text)
    other_torch = folder / "clock" / "torch-2.7.0.dist-info"
    other_torch.mkdir()
    (other_torch / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.7.0\n")
    (folder / "foreign" / "monitoring").mkdir(parents=True)
    (folder / "foreign" / "monitoring" / "__init__.py").touch()
    (folder / "foreign" / "sitecustomize.py").write_text(LATE)
    for host, name in ((first, "gpu"), (second, "clock"), (third, "foreign")):
        host.environment["PYTHONPATH"] = str(folder / name)
    for host in (first, second, third):
        host.kill()
        host.boot()
    (third.folder / "hosts").write_text("127.0.0.1 localhost\n")
    fourth.run("kill $(pgrep -o sshd)")
    fifth.run(f"mount -t tmpfs none {REPOSITORY}/mcl_dist")
    decoder = next(found for name in DALI for found in Distribution.discover(name=name))
    described = f"{decoder.name.replace('-', '_')}-{decoder.version}.dist-info"
    for host in (first, second, third, fifth):
        host.run(f"mount -t tmpfs none {decoder.locate_file(described)}")

    first.run("python3 -m http.server --bind 127.0.0.1 9400 >/dev/null 2>&1 </dev/null &")
    first.run("until : >/dev/tcp/127.0.0.1/9400; do sleep 0.05; done 2>/dev/null")
    first.run(f"cp -r {shards} {rig.own}/missing && cp -r {shards} {rig.own}/other")
    second.run(f"cp -r {shards} {rig.own}/other")
    # Sealed anew, as another build would be.
    second.run(
        f"cd {REPOSITORY} && {sys.executable} -c 'from pathlib import Path; "
        "from tests.support.shard_sets import reseal; "
        f'folder = Path("{rig.own}/other"); tar = folder / "shard-000000.tar"; tar.chmod(0o644); '
        f"tar.write_bytes(tar.read_bytes() + bytes(1024)); reseal(folder)'"
    )
    changed = folder / "demo.py"
    changed.write_text((REPOSITORY / "launch" / "cli" / "demo.py").read_text() + "# changed\n")
    second.run(f"mount --bind {changed} {REPOSITORY}/launch/cli/demo.py")
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
    with running_hosts(work / "rig", count=5) as rig:
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
        ("packages", "node5", "`mcl_dist` is not ours: nothing", "install mcl-dist into this Python"),
        ("torch", "node2", "2.7.0, but 2.", "constraints.txt"),
        (DALI[0], ALL, "missing", "its extra cuda13 or cuda12"),
        ("code", "node2", "but", "install the same mcl-dist"),
        ("GPUs", "node2", "none for 1 ranks", "driver"),
        ("clock", "node2", "s ahead of this host's", "NTP"),
        ("clock", "node3", "s behind this host's", "NTP"),
        ("name", "node2", "node2 is 127.0.1.1 to itself", "/etc/hosts"),
        ("name", "node3", "node3 has no address", "/etc/hosts"),
        ("shared memory", "node2", "16.0 MiB free in /dev/shm", "--shm-size"),
        ("locked memory", "node2", "limit 0.1 MiB beside InfiniBand", "unlimited"),
        ("ports", "node1", "127.0.0.1:9400 Address already in use", "a port that is free"),
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
