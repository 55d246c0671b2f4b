"""What a real Prometheus, set up by the files that we ship, makes of a run of two ranks, a bench and a build."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.supervision.deepspeed_launcher import free_port
from tests.launch.cli.test_pretrain import kill_everything, start, words
from tests.support.ports import free_ports
from tests.support.queries import BOARDS, INTERVAL, operands, panel_queries, rules
from tests.support.real_prometheus import SCRAPE_SECONDS, Prometheus, faster, until

SECONDS = 150.0
NO_GPU = "there is no GPU"
EMPTY = {
    "mcl-training / GPU use / {{run}} {{rank}}": NO_GPU,
    "mcl-training / GPU memory / {{run}} {{rank}}": NO_GPU,
    "mcl-training / GPU temperature / {{run}} {{rank}}": NO_GPU,
}
CHOICES = {choice["name"]: choice for board in BOARDS.values() for choice in board["templating"]["list"]}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        None in map(shutil.which, ("prometheus", "prometheus-pushgateway")), reason="prometheus is not installed"
    ),
]


def chosen(query: str) -> str:
    """A query as Grafana asks it with all chosen, over the shortest interval that it takes: four scrapes."""
    query = query.replace(INTERVAL, f"{4000 * SCRAPE_SECONDS:.0f}ms")
    return re.sub(r"\$(\w+)", lambda found: str(CHOICES[found[1]]["allValue"]), query)


def asked() -> Iterator[tuple[str, str]]:
    """Name and query: panels' own, what rules record, and what alerts hold against their limits."""
    yield from ((name, chosen(query)) for name, query in panel_queries())
    for name, rule in rules():
        if "record" in rule:
            yield name, name
        else:
            yield from ((f"{name} / {operand}", faster(operand)) for operand in operands(rule["expr"]))


@dataclass(frozen=True)
class Watched:
    """A run in progress, a bench of the loader, a build, and who watches all of them."""

    prometheus: Prometheus
    run: Path
    build: subprocess.Popen[bytes]

    @property
    def lines(self) -> list[dict[str, float]]:
        """What the run has written of its steps."""
        lines = (self.run / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def started_gateway(port: int) -> subprocess.Popen[bytes]:
    """A real Pushgateway."""
    command = ["prometheus-pushgateway", f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def started_build(videos: Path, destination: Path, port: int, gateway: int) -> subprocess.Popen[bytes]:
    """A build of these videos and of one that cannot be read."""
    source = Path(shutil.copytree(videos, destination.with_name("videos")))
    (next(source.iterdir()) / "broken.mp4").write_bytes(b"no video")
    options = ["--workers", "1", "--short-side", "0", "--metrics-port", str(port)]
    options += ["--push-gateway", f"http://127.0.0.1:{gateway}"]
    command = [sys.executable, "-m", "launch.cli.main", "shards", "build", str(source), str(destination), *options]
    with destination.with_name("build.log").open("w") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def started_bench(shards: Path, port: int) -> subprocess.Popen[bytes]:
    """A bench of the loader that goes on for longer than anybody looks, and lets the others go first."""
    command = [sys.executable, "-m", "launch.cli.main", "bench", "loader", "--data", str(shards)]
    command += ["--epochs", "9999", "--metrics-port", str(port), "train.global_batch=4", "data.crop=48"]
    return subprocess.Popen(["nice", "-n", "19", *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def watched(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder, port, bench_port, gateway_port = tmp_path_factory.mktemp("watched"), *(free_port() for _ in range(3))
    run = folder / "run"
    prometheus = Prometheus(folder / "prometheus", {9500: port, 9600: bench_port, 9091: gateway_port})
    gateway = started_gateway(gateway_port)
    settings = [f"monitoring.port={free_ports(2)}", f"monitoring.http.file_sd={prometheus.targets}/run.json"]
    settings += ["monitoring.peak_tflops=1", "train.steps=99999", "checkpoint.every=4"]
    settings += ["evaluate.every=4", f"evaluate.test={synthetic_shards}", "evaluate.clips=1"]
    bench = started_bench(synthetic_shards, bench_port)
    try:
        training = start(*words(synthetic_shards, run, *settings), "--ranks", "2")
        try:
            # It looks for new targets every five seconds, for which a small build would hardly last.
            assert until(lambda: bool(prometheus.series('up{job="mcl-build"}')), SECONDS)
            build = started_build(synthetic_shards.parent / "train", folder / "set", port, gateway_port)
            try:
                yield Watched(prometheus, run, build)
            finally:
                build.kill()
                build.wait()
        finally:
            kill_everything(training, run)
    finally:
        for process in (bench, gateway):
            process.kill()
            process.wait()
        prometheus.close()


def test_every_query_of_every_panel_and_rule_returns_data_but_those_that_have_none_here(watched: Watched) -> None:
    queries = dict(asked())
    assert set(EMPTY) <= set(queries)
    waiting = {name: query for name, query in queries.items() if name not in EMPTY}

    def all_came() -> bool:
        assert not watched.build.poll(), watched.run.with_name("build.log").read_text()
        for name, query in list(waiting.items()):
            if watched.prometheus.series(query):
                del waiting[name]
        return not waiting

    assert until(all_came, SECONDS), waiting
    assert not [name for name in EMPTY if watched.prometheus.series(queries[name])]


def test_no_rule_fails(watched: Watched) -> None:
    groups = watched.prometheus.get("rules")["groups"]
    found = {rule["name"]: (rule["health"], rule.get("lastError", "")) for group in groups for rule in group["rules"]}
    assert found == {name: ("ok", "") for name, _ in rules()}


def test_what_a_panel_draws_has_the_labels_of_its_legend(watched: Watched) -> None:
    for name, query in panel_queries():
        named = set(re.findall(r"{{(\w+)}}", name))
        for labels, _ in watched.prometheus.series(chosen(query)):
            assert named <= set(labels), name


def test_a_build_that_has_ended_is_seen_to_be_complete(watched: Watched) -> None:
    assert watched.build.wait(SECONDS) == 0
    query = 'mcl_build_complete{job="mcl-build",run="set"} == 1'
    assert until(lambda: bool(watched.prometheus.series(query)), SECONDS)


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_a_dashboard_offers_what_there_is(watched: Watched, board: dict[str, dict[str, list[dict[str, str]]]]) -> None:
    offered = {}
    for choice in board["templating"]["list"][1:]:
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", chosen(choice["query"]))
        assert found
        offered[choice["name"]] = watched.prometheus.get(f"label/{found[2]}/values", **{"match[]": found[1]})
    if "mcl_loader" in board["templating"]["list"][1]["query"]:
        assert offered == {"job": ["mcl", "mcl-bench"], "run": ["bench", "run"], "rank": ["0", "1"]}
    elif "rank" in offered:
        assert offered == {"job": ["mcl"], "run": ["run"], "rank": ["0", "1"]}
    else:
        assert (offered["job"], offered["run"], len(offered["instance"])) == (["mcl-build"], ["build", "set"], 2)


def test_the_loader_of_a_bench_is_seen_while_it_runs(watched: Watched) -> None:
    def last(name: str) -> float:
        ((_, values),) = watched.prometheus.series(f'{name}{{job="mcl-bench"}}')
        return values[max(values)]

    assert last("mcl_loader_samples_delivered_total") == last("mcl_loader_samples_expected_total") > 0
    assert last("mcl_loader_samples_unaccounted") == 0
    assert last("mcl_storage_bytes_read_total") >= last("mcl_storage_bytes_decoded_total") > 0


def test_what_prometheus_has_seen_is_what_the_run_wrote_down(watched: Watched) -> None:
    def steps_seen() -> dict[float, float]:
        return next((values for _, values in watched.prometheus.series("mcl_step > 0")), {})

    assert until(lambda: len(set(steps_seen().values())) >= 5, SECONDS)
    steps = steps_seen()
    seen = {
        name: watched.prometheus.series(query)
        for name, query in {
            "loss": 'mcl_loss{term="total"}',
            "loss_inter": 'mcl_loss{term="inter"}',
            "loss_order": 'mcl_loss{term="order"}',
            "learning_rate": "mcl_learning_rate",
            "gradient_norm": "mcl_gradient_norm",
            "videos": "mcl_videos_total",
        }.items()
    }
    lines, videos = watched.lines, 0.0
    for line in lines:
        videos += line["videos_per_second"] * line["seconds"]
        line["videos"] = videos
    for name, ((_, values),) in seen.items():
        assert {at: values[at] for at in steps} == pytest.approx(
            {at: lines[int(step) - 1][name] for at, step in steps.items()}
        ), name
