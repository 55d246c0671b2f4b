"""A real Prometheus with the shipped configuration monitors a run of two ranks, a benchmark and a build."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.supervision.deepspeed_launcher import free_port
from tests.launch.cli.test_pretrain import arguments_for, kill_everything, start
from tests.support.ports import free_ports
from tests.support.queries import DASHBOARD_JSON, INTERVAL, operands, panel_queries, rules
from tests.support.real_prometheus import SCRAPE_SECONDS, Prometheus, speed_up, until

SECONDS = 150.0
NO_GPU = "no GPU"
EMPTY = {
    "mcl-training / GPU utilisation / {{run}} {{rank}}": NO_GPU,
    "mcl-training / GPU memory / {{run}} {{rank}}": NO_GPU,
    "mcl-training / GPU temperature / {{run}} {{rank}}": NO_GPU,
}
VARIABLES = {each["name"]: each for dashboard in DASHBOARD_JSON.values() for each in dashboard["templating"]["list"]}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        None in map(shutil.which, ("prometheus", "prometheus-pushgateway")), reason="prometheus is not installed"
    ),
]


def with_all_selected(query: str) -> str:
    """A query as Grafana sends it with all options selected, over its shortest interval: four scrapes."""
    query = query.replace(INTERVAL, f"{4000 * SCRAPE_SECONDS:.0f}ms")
    return re.sub(r"\$(\w+)", lambda found: str(VARIABLES[found[1]]["allValue"]), query)


def all_queries() -> Iterator[tuple[str, str]]:
    """Names and queries: of panels, of recording rules, and of the operands that alerts compare."""
    yield from ((name, with_all_selected(query)) for name, query in panel_queries())
    for name, rule in rules():
        if "record" in rule:
            yield name, name
        else:
            yield from ((f"{name} / {operand}", speed_up(operand)) for operand in operands(rule["expr"]))


@dataclass(frozen=True)
class MonitoredRun:
    """A run in progress and a build, with the Prometheus that scrapes them."""

    prometheus: Prometheus
    run: Path
    build: subprocess.Popen[bytes]

    @property
    def lines(self) -> list[dict[str, float]]:
        """Records of the run's metrics file."""
        lines = (self.run / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def start_pushgateway(port: int) -> subprocess.Popen[bytes]:
    """Start a real Pushgateway."""
    command = ["prometheus-pushgateway", f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def start_build(videos: Path, destination: Path, port: int, pushgateway: int) -> subprocess.Popen[bytes]:
    """Start a build of these videos and of an unreadable one."""
    source = Path(shutil.copytree(videos, destination.with_name("videos")))
    (next(source.iterdir()) / "broken.mp4").write_bytes(b"no video")
    options = ["--workers", "1", "--short-side", "0", "--metrics-port", str(port)]
    options += ["--push-gateway", f"http://127.0.0.1:{pushgateway}"]
    command = [sys.executable, "-m", "launch.cli.main", "shards", "build", str(source), str(destination), *options]
    with destination.with_name("build.log").open("w") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def start_bench(shards: Path, port: int) -> subprocess.Popen[bytes]:
    """Start a loader benchmark that outlasts the tests, with low priority."""
    command = [sys.executable, "-m", "launch.cli.main", "bench", "loader", "--data", str(shards)]
    command += ["--epochs", "9999", "--metrics-port", str(port), "train.global_batch=4", "data.crop=48"]
    return subprocess.Popen(["nice", "-n", "19", *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def monitored(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredRun]:
    folder, port, bench_port, pushgateway_port = tmp_path_factory.mktemp("monitored"), *(free_port() for _ in range(3))
    run = folder / "run"
    settings = [f"monitoring.port={free_ports(2)}", f"monitoring.targets={folder}/prometheus/targets/run.json"]
    settings += ["monitoring.peak_tflops=1", "train.steps=99999", "checkpoint.every=4"]
    settings += ["evaluate.every=4", f"evaluate.test={synthetic_shards}", "evaluate.clips=1"]
    with ExitStack() as stack:

        def until_exit(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        ports = {9500: port, 9600: bench_port, 9091: pushgateway_port}
        prometheus = stack.enter_context(closing(Prometheus(folder / "prometheus", ports)))
        until_exit(start_pushgateway(pushgateway_port))
        until_exit(start_bench(synthetic_shards, bench_port))
        training = start(*arguments_for(synthetic_shards, run, *settings), "--ranks", "2")
        stack.callback(kill_everything, training, run)
        # Prometheus looks for new targets every five seconds; a small build could end before that.
        assert until(lambda: bool(prometheus.series('up{job="mcl-build"}')), SECONDS)
        build = until_exit(start_build(synthetic_shards.parent / "train", folder / "set", port, pushgateway_port))
        yield MonitoredRun(prometheus, run, build)


def test_every_query_of_every_panel_and_rule_returns_data_except_those_of_a_gpu(monitored: MonitoredRun) -> None:
    queries = dict(all_queries())
    assert set(EMPTY) <= set(queries)
    waiting = {name: query for name, query in queries.items() if name not in EMPTY}

    def all_have_data() -> bool:
        assert not monitored.build.poll(), monitored.run.with_name("build.log").read_text()
        for name, query in list(waiting.items()):
            if monitored.prometheus.series(query):
                del waiting[name]
        return not waiting

    assert until(all_have_data, SECONDS), waiting
    assert not [name for name in EMPTY if monitored.prometheus.series(queries[name])]


def test_no_rule_fails(monitored: MonitoredRun) -> None:
    groups = monitored.prometheus.get("rules")["groups"]
    found = {rule["name"]: (rule["health"], rule.get("lastError", "")) for group in groups for rule in group["rules"]}
    assert found == {name: ("ok", "") for name, _ in rules()}


def test_the_series_of_a_panel_have_the_labels_of_its_legend(monitored: MonitoredRun) -> None:
    for name, query in panel_queries():
        named = set(re.findall(r"{{(\w+)}}", name))
        for labels, _ in monitored.prometheus.series(with_all_selected(query)):
            assert named <= set(labels), name


def test_a_build_that_has_ended_is_shown_as_complete(monitored: MonitoredRun) -> None:
    assert monitored.build.wait(SECONDS) == 0
    query = 'mcl_build_complete{job="mcl-build",run="set"} == 1'
    assert until(lambda: bool(monitored.prometheus.series(query)), SECONDS)


@pytest.mark.parametrize("dashboard", DASHBOARD_JSON.values(), ids=DASHBOARD_JSON)
def test_a_dashboard_offers_the_existing_jobs_runs_and_ranks(
    monitored: MonitoredRun, dashboard: dict[str, dict[str, list[dict[str, str]]]]
) -> None:
    options = {}
    for choice in dashboard["templating"]["list"][1:]:
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", with_all_selected(choice["query"]))
        assert found
        options[choice["name"]] = monitored.prometheus.get(f"label/{found[2]}/values", **{"match[]": found[1]})
    if "mcl_loader" in dashboard["templating"]["list"][1]["query"]:
        assert options == {"job": ["mcl", "mcl-bench"], "run": ["bench", "run"], "rank": ["0", "1"]}
    elif "rank" in options:
        assert options == {"job": ["mcl"], "run": ["run"], "rank": ["0", "1"]}
    else:
        assert (options["job"], options["run"], len(options["instance"])) == (["mcl-build"], ["build", "set"], 2)


def test_the_loader_of_a_benchmark_is_monitored_while_it_runs(monitored: MonitoredRun) -> None:
    def last(name: str) -> float:
        ((_, values),) = monitored.prometheus.series(f'{name}{{job="mcl-bench"}}')
        return values[max(values)]

    assert last("mcl_loader_samples_delivered_total") == last("mcl_loader_samples_expected_total") > 0
    assert last("mcl_loader_samples_unaccounted") == 0
    assert last("mcl_storage_bytes_read_total") >= last("mcl_storage_bytes_decoded_total") > 0


def test_the_scraped_series_agree_with_the_metrics_file(monitored: MonitoredRun) -> None:
    def scraped_steps() -> dict[float, float]:
        return next((values for _, values in monitored.prometheus.series("mcl_step > 0")), {})

    assert until(lambda: len(set(scraped_steps().values())) >= 5, SECONDS)
    steps = scraped_steps()
    series = {
        name: monitored.prometheus.series(query)
        for name, query in {
            "loss": 'mcl_loss{term="total"}',
            "loss_inter": 'mcl_loss{term="inter"}',
            "loss_order": 'mcl_loss{term="order"}',
            "learning_rate": "mcl_learning_rate",
            "gradient_norm": "mcl_gradient_norm",
            "videos": "mcl_videos_total",
        }.items()
    }
    lines, videos = monitored.lines, 0.0
    for line in lines:
        videos += line["videos_per_second"] * line["seconds"]
        line["videos"] = videos
    for name, ((_, values),) in series.items():
        assert {at: values[at] for at in steps} == pytest.approx(
            {at: lines[int(step) - 1][name] for at, step in steps.items()}
        ), name
