"""`mcl doctor` on virtual hosts, healthy and with every fault that it reports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from launch.cluster.doctor_checks import ALL, FAIL, CheckResult
from launch.cluster.doctor_diagnostics import NODE_SECONDS
from launch.cluster.doctor_node import DALI
from tests.support.hosts import Host, Rig, missing, running_hosts
from tests.support.paths import REPOSITORY

CONFIG = str(REPOSITORY / "configs" / "pretrain" / "tiny.yaml")
SECONDS = 120
PROGRAM = """
import sys
from functools import partial
from launch.cli.main import main
from launch.cluster import doctor_diagnostics
doctor_diagnostics.Diagnostics = partial(doctor_diagnostics.Diagnostics, node_seconds={seconds})
sys.exit(main())
"""

DoctorRun = tuple[Rig, int, list[CheckResult]]  # hosts, exit code, rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def run_doctor(
    rig: Rig, *arguments: str, hostfile: Path | None = None, node_seconds: float = NODE_SECONDS
) -> tuple[int, list[CheckResult]]:
    code = PROGRAM.format(seconds=node_seconds)
    command = [sys.executable, "-c", code, "doctor", "--hostfile", str(hostfile or rig.hostfile), "--json"]
    command += ["--ssh-config", str(rig.ssh_config), *arguments]
    process = rig.head.popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = process.communicate(timeout=SECONDS)
    assert output, errors
    return process.returncode, [CheckResult(**row) for row in json.loads(output)]


def failures(rows: Sequence[CheckResult], check: str) -> dict[str, str]:
    """Findings and remedies, by node."""
    found = [row for row in rows if row.check == check and row.state == FAIL]
    assert all(row.remedy for row in found)
    return {
        node: "\n".join(f"{row.found}; {row.remedy}" for row in found if row.node == node)
        for node in {row.node for row in found}
    }


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_hosts(tmp_path_factory.mktemp("doctor") / "rig") as rig:
        yield rig


def test_two_healthy_hosts_pass_and_nothing_is_left_on_them(healthy: Rig, synthetic_shards: Path) -> None:
    run = healthy.work / "run"
    settings = [f"data.train={synthetic_shards}", f"run.dir={run}", f"data.cache={healthy.own}", "monitoring.port=9400"]
    code, rows = run_doctor(healthy, "--config", CONFIG, *settings)
    assert [row for row in rows if row.state == FAIL] == []
    assert code == 0
    by_check = {row.check: row for row in rows}
    assert "2 ranks over gloo" in by_check["all-reduce"].found
    assert by_check["shared checkpoints"].node == by_check["data"].node == ALL
    assert "another folder on each node" in by_check["shared cache"].found
    assert not list(healthy.work.rglob("*mcl-doctor*"))
    assert not any(host.processes() for host in healthy.hosts)


def test_a_slow_link_fails_with_its_speed(healthy: Rig) -> None:
    healthy[1].run("tc qdisc add dev eth0 root tbf rate 300mbit burst 64kb latency 50ms")
    code, rows = run_doctor(healthy)
    healthy[1].run("tc qdisc del dev eth0 root")
    assert code == 1
    assert "MB/s; check the links' speed" in failures(rows, "all-reduce")[ALL]


def test_a_node_that_cannot_be_reached_or_lacks_this_folder_or_does_not_answer_fails_with_a_remedy(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    work = tmp_path_factory.mktemp("unreached")
    (work / "sitecustomize.py").write_text("import time; time.sleep(1e6)\n")
    with running_hosts(work / "rig", count=4) as rig:
        closed, unknown, bare, hanging = rig.hosts
        closed.run(f"mount --bind /dev/null {rig.work}/user_key.pub")
        known = rig.work / "known_hosts"
        known.write_text(known.read_text().replace(_host_key(unknown), _host_key(bare)))
        bare.run(f"mount -t tmpfs none {REPOSITORY}")
        hanging.environment["PYTHONPATH"] = str(work)
        hanging.kill()
        hanging.boot()
        code, rows = run_doctor(rig, node_seconds=2)
    assert code == 1
    messages = failures(rows, "reached")
    for host, found, remedy in (
        (closed, "Permission denied", "authorise your key there (ssh-copy-id node1)"),
        (unknown, "Host key verification failed", "ssh-keyscan node2"),
        (bare, "No such file or directory", sys.executable),
        (hanging, "no answer within 2 s", "check for a store or a mounted file system"),
    ):
        assert found in messages[host.name]
        assert remedy in messages[host.name]


def _host_key(host: Host) -> str:
    return (host.folder / "host_key.pub").read_text().split()[1]


# A store that forbids 10.77.0.1 to write, and returns the bytes of others in reverse.
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


def test_a_store_that_a_node_cannot_write_and_a_node_missing_from_the_all_reduce_are_reported(
    healthy: Rig, synthetic_shards: Path
) -> None:
    access = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for host in healthy.hosts:
        host.environment |= {**access, "AWS_ENDPOINT_URL": "http://10.77.0.254:9000"}
        host.kill()
        host.boot()
    healthy[1].run(f"mount --bind /dev/null {REPOSITORY}/launch/cluster/doctor_link.py")
    store = healthy.head.popen([sys.executable, "-c", STORE])
    try:
        healthy.head.run("until : >/dev/tcp/10.77.0.254/9000; do sleep 0.05; done 2>/dev/null")
        settings = [
            f"data.train={synthetic_shards}",
            f"run.dir={healthy.work}/run",
            "checkpoint.folder=s3://bucket/run",
        ]
        code, rows = run_doctor(healthy, "--config", CONFIG, *settings, "--timeout", "3")
    finally:
        store.kill()
        store.wait()
    assert code == 1
    messages = failures(rows, "checkpoints")
    assert "s3://bucket/run" in messages["node1"]
    assert "permission denied" in messages["node1"]
    assert "make it writable for this user on this node" in messages["node1"]
    assert "returns other bytes than were written" in messages["node2"]
    assert "no answer; open all ports" in failures(rows, "all-reduce")["node2"]


CLOCK = "import time; true = time.time; time.time = lambda: true() + 90\n"
LATE = CLOCK.replace("+", "-")
IMAGINARY_GPU = "import torch; torch.cuda.device_count = lambda: 1; torch.cuda.get_device_name = lambda index: 'G1'\n"


def plant_package_faults(rig: Rig, folder: Path) -> None:
    """Hide, change or remove packages; two clocks are wrong as well, since a sitecustomize module sets them."""
    first, second, third, fourth, fifth = rig.hosts
    for name, text in (("clock", CLOCK), ("gpu", IMAGINARY_GPU), ("foreign", LATE)):
        (folder / name).mkdir()
        (folder / name / "sitecustomize.py").write_text(text)
    other_torch = folder / "clock" / "torch-2.7.0.dist-info"
    other_torch.mkdir()
    (other_torch / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.7.0\n")
    (folder / "foreign" / "monitoring").mkdir()
    (folder / "foreign" / "monitoring" / "__init__.py").touch()
    for host, name in ((first, "gpu"), (second, "clock"), (third, "foreign")):
        host.environment["PYTHONPATH"] = str(folder / name)
        host.kill()
        host.boot()
    (third.folder / "hosts").write_text("127.0.0.1 localhost\n")
    fourth.run("kill $(pgrep -o sshd)")
    fifth.run(f"mount -t tmpfs none {REPOSITORY}/mcl_dist")
    decoder = next(found for name in DALI for found in Distribution.discover(name=name))
    metadata = f"{decoder.name.replace('-', '_')}-{decoder.version}.dist-info"
    for host in (first, second, third, fifth):
        host.run(f"mount -t tmpfs none {decoder.locate_file(metadata)}")
    changed = folder / "demo.py"
    changed.write_text((REPOSITORY / "launch" / "cli" / "demo.py").read_text() + "# changed\n")
    second.run(f"mount --bind {changed} {REPOSITORY}/launch/cli/demo.py")


def plant_set_faults(rig: Rig, shards: Path) -> None:
    """One set is only on the first node; another has other digests on the second node, as from another build."""
    first, second = rig[0], rig[1]
    first.run(f"cp -r {shards} {rig.own}/missing && cp -r {shards} {rig.own}/other")
    second.run(f"cp -r {shards} {rig.own}/other")
    second.run(
        f"cd {REPOSITORY} && {sys.executable} -c 'from pathlib import Path; "
        "from tests.support.shard_sets import update_digests; "
        f'folder = Path("{rig.own}/other"); tar = folder / "shard-000000.tar"; tar.chmod(0o644); '
        f"tar.write_bytes(tar.read_bytes() + bytes(1024)); update_digests(folder)'"
    )


def plant_system_faults(rig: Rig) -> None:
    """A port in use on the first node; read-only or full folders, low limits and a wrong network on the second."""
    first, second = rig[0], rig[1]
    first.run("python3 -m http.server --bind 127.0.0.1 9400 >/dev/null 2>&1 </dev/null &")
    first.run("until : >/dev/tcp/127.0.0.1/9400; do sleep 0.05; done 2>/dev/null")
    (rig.work / "run").mkdir()
    second.run(f"mount --bind {rig.work}/run {rig.work}/run && mount -o remount,bind,ro {rig.work}/run")
    second.run(f"mkdir {rig.own}/cache && mount -t tmpfs -o size=1m none {rig.own}/cache")
    second.run("mount -o remount,size=16m /dev/shm")
    second.run("mount -t tmpfs none /sys/class && mkdir -p /sys/class/infiniband/mlx5_0")
    second.run("prlimit --memlock=65536 --pid $(pgrep -o sshd)")
    (second.folder / "hosts").write_text(rig.hosts_file({"node2": "127.0.1.1"}))
    second.run(f"ip route add blackhole {first.address}")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, synthetic_shards: Path) -> Iterator[DoctorRun]:
    work = tmp_path_factory.mktemp("faults")
    with running_hosts(work / "rig", count=5) as rig:
        plant_package_faults(rig, work)
        plant_set_faults(rig, synthetic_shards)
        plant_system_faults(rig)
        own = rig.own
        sets = f"data.sets=[{{url: {synthetic_shards}}}, {{url: {own}/missing}}, {{url: {own}/other}}]"
        settings = [f"run.dir={rig.work}/run", f"checkpoint.folder={own}/checkpoints", f"data.cache={own}/cache"]
        settings += ["monitoring.port=9400", "--timeout", "5"]
        hostfile = work / "hosts"
        hostfile.write_text(rig.hostfile.read_text() + "nowhere slots=1\n")
        yield rig, *run_doctor(rig, "--config", CONFIG, sets, *settings, hostfile=hostfile)


def test_the_command_fails_with_planted_faults(faulty: DoctorRun) -> None:
    assert faulty[1] == 1


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
        ("name", "node2", "node2 resolves to 127.0.1.1 on itself", "/etc/hosts"),
        ("name", "node3", "node3 has no address", "/etc/hosts"),
        ("shared memory", "node2", "16.0 MiB free in /dev/shm", "--shm-size"),
        ("locked memory", "node2", "limit 0.1 MiB, too low for InfiniBand", "unlimited"),
        ("ports", "node1", "127.0.0.1:9400 Address already in use", "a port that is free"),
        ("data", "node2", "missing/manifest.json: no such file", "credentials"),
        ("run", "node2", "Read-only file system", "writable"),
        ("cache", "node2", "1.0 MiB free", "2.0 GiB or more"),
        ("shared checkpoints", "node2", "is not the folder of node1", "shared file system"),
        ("all-reduce", "node2", "", "GLOO_SOCKET_IFNAME"),
    ],
)
def test_a_fault_is_reported_with_its_node_and_remedy(
    faulty: DoctorRun, check: str, node: str, found: str, remedy: str
) -> None:
    message = failures(faulty[2], check)[node]
    assert found in message
    assert remedy in message


def test_a_set_that_differs_between_nodes_is_reported(faulty: DoctorRun) -> None:
    (row,) = (row for row in faulty[2] if row.check == "data" and "(manifest" in row.found)
    assert (row.node, row.state) == ("node2", FAIL)
    assert "copy the same set" in row.remedy


def test_a_node_without_faults_passes(faulty: DoctorRun) -> None:
    failed = {row.check for row in faulty[2] if row.state == FAIL and row.node == "node1"}
    assert failed <= {"ports", "shared checkpoints", "all-reduce"}


def test_the_command_names_a_package_that_hides_ours(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from mcl_dist.__main__ import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"mcl: `launch` is not ours: {tmp_path}/launch/__init__.py hides ")
