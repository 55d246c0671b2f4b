"""Report of a run that has everything a report shows: metrics, events, two checkpoints, evaluations."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import tempfile
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import fsspec
import pytest
import torch

from launch.cli.main import main
from launch.evaluation.results_log import ONLINE, append_result, read_results
from launch.report.report_alignment import measure_alignment
from launch.report.report_evaluations import evaluations_section
from launch.report.svg_chart import Curve, chart, ticks
from launch.run.config import PretrainConfig
from launch.terminal.units import format_number
from mcl_dist.batch import FIRST_KEY, QUERY, TubeletBatch
from mcl_dist.checkpoint import CheckpointManager, read_snapshot
from mcl_dist.config import build_config, dump_config
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import EXIT_FAILURE, EXIT_USAGE
from mcl_dist.events import Evaluated, Finished, Started, StepDone
from mcl_dist.model.encoder import normalise
from mcl_dist.model.network import Network
from mcl_dist.objective.alignment import align, alignment_map, automatic_gradient
from mcl_dist.objective.momentum_encoder import MomentumEncoder
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.training.pretrain_state import PretrainState
from tests.support.browser import Elements, chromium
from tests.support.run_files import write_events

STEPS = 20
SECTIONS = ("configuration", "curves", "evaluations", "tubelets", "alignment", "neighbours")
HOSTILE = "<script>document.title='taken'</script>"


def make_config(run: Path, shards: Path) -> PretrainConfig:
    data = {"train": str(shards), "frames": 16, "stride": 2, "crop": 32}
    tree = {"run": {"dir": str(run)}, "data": data, "encoder": {"width": 4, "blocks": [1, 1]}, "heads": {"dim": 8}}
    return build_config(PretrainConfig, tree)


def save_checkpoint(run: Path, config: PretrainConfig, step: int) -> None:
    torch.manual_seed(step)
    network = Network(config.encoder, config.heads)
    state = PretrainState(
        network, MomentumEncoder(network, ProcessGroup(), seed=0, autocast=False), NegativeQueue(torch.rand(4, 8))
    )
    CheckpointManager(f"{run}/checkpoints", ProcessGroup()).save(state.shard(step, {}, dataclasses.asdict(config)))


@pytest.fixture(scope="module")
def run(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reported") / HOSTILE.replace("/", "")
    run.mkdir()
    config = make_config(run, synthetic_shards)
    (run / "config.yaml").write_text(dump_config(config))
    steps = [
        StepDone(step, 0, STEPS, {"loss": math.nan if step == 7 else 7.0 / step, "loss_inter": 5.0 / step}, 1e-3 * step,
                 videos=8, seconds=0.5 + step / 100, data_wait_ratio=0.125, gradient_norm=2.0)
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    evaluated = [Evaluated(step, {"top1": step / 40, "top5": 0.75, "mean_class": 0.25}, 9.0) for step in (10, 20)]
    write_events(run, Started(0, STEPS, None), *steps, *evaluated, Finished(STEPS, 2**30))
    for step in (10, STEPS):
        save_checkpoint(run, config, step)
    sets = ("--train", str(synthetic_shards), "--test", str(synthetic_shards), "--clips", "1")
    assert main(["evaluate", "knn", "--checkpoint", str(run), *sets, "features.keep=false"]) == 0
    return run


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    assert main(["report", str(run), "--videos", "2"]) == 0
    return run / "report.html"


@pytest.fixture(scope="module")
def html(page: Path) -> str:
    return page.read_text()


class Tables(HTMLParser):
    """The cell texts of every table row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._is_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag == "tr":
            self.rows.append([])
        self._is_cell |= tag == "td"
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_cell &= tag != "td"

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.rows[-1][-1] += data


@pytest.mark.slow
def test_every_section_has_content(html: str) -> None:
    found = [attributes.get("id") for tag, attributes in Elements(html).found if tag == "section"]
    assert [name for name in found if name in SECTIONS] == list(SECTIONS)
    assert "Not available" not in html


def test_chart_tables_show_the_values_of_the_metrics_file(html: str, run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = {row[0]: row[1:] for row in Tables(html).rows if len(row) == 5}
    for name, key, scale in (
        ("total", "loss", 1),
        ("inter", "loss_inter", 1),
        ("learning rate", "learning_rate", 1),
        ("videos/s", "videos_per_second", 1),
        ("data wait", "data_wait_ratio", 100),
    ):
        values = [scale * line[key] for line in lines if line[key] is not None]
        expected = [format_number(value) for value in (values[-1], values[0], min(values), max(values))]
        assert rows[name] == expected, name
    assert rows["top-1"] == ["50.0", "25.0", "25.0", "50.0"]
    total = next(attributes["d"] for _, attributes in Elements(html).found if attributes.get("data-name") == "total")
    assert len(re.findall("[ML]", total or "")) == STEPS - 1
    assert (total or "").count("M") == 2  # before and after the skipped step


def test_results_of_the_run_and_of_the_paper_are_shown(html: str, run: Path) -> None:
    (line,) = read_results(run)
    rows = Tables(html).rows
    own = next(row for row in rows if row and row[0].startswith("knn: 1 clips × 1 crops"))
    assert own[2].startswith(f"{line['top1']:.2%}(")
    assert own[6] == f"step {STEPS}"
    for top1, where in (("81.91 %", "UCF101"), ("66.62 %", "Kinetics-400")):
        assert [row for row in rows if row[0:1] == ["MCL, R(2+1)D-50 [1]"] and row[2:] == [where, top1]]


def test_neighbours_are_marked_as_same_or_other_class(html: str, run: Path) -> None:
    (line,) = read_results(run)
    (strips,) = line["neighbours"]
    marks = [mark for mark in re.findall('<figure class="(own|right|wrong)">', html) if mark != "own"]
    assert marks == ["right" if label == strip["label"] else "wrong" for strip in strips for label in strip["labels"]]
    assert [strip["labels"][0] == strip["label"] for strip in strips] == [True] * len(strips)  # the set holds itself


def test_alignment_maps_equal_those_of_the_training_gradient_for_every_batch_norm(
    run: Path, synthetic_shards: Path
) -> None:
    config = make_config(run, synthetic_shards)
    snapshot = read_snapshot(f"{run}/checkpoints/step-{STEPS:09d}")
    draw = torch.Generator().manual_seed(1)
    views = torch.randint(0, 256, (3, 4, 16, 32, 32, 3), generator=draw, dtype=torch.uint8)
    motion = torch.rand(3, 4, 4, 4, generator=draw)
    order, samples, boxes = torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.zeros(3, 4, 4)
    batch = TubeletBatch(views=views, motion=motion, order=order, samples=samples, boxes=boxes)
    network = Network(config.encoder, config.heads).train()
    network.load_state_dict(snapshot.network, strict=False)
    output = network(normalise(views[:, QUERY]))
    with torch.no_grad():
        key = network(normalise(views[:, FIRST_KEY])).inter.vector
    expected = alignment_map(automatic_gradient(output, key, output.features.projected)).detach()
    for batch_norm in ("shuffled", "synchronized"):
        snapshot.config["encoder"]["batch_norm"] = batch_norm
        found = measure_alignment(snapshot, batch)
        torch.testing.assert_close(torch.from_numpy(found.maps), expected, rtol=1e-4, atol=1e-7)
        assert float(found.agreement.loss) == pytest.approx(float(align(expected, motion).loss), abs=1e-4)


def test_a_section_without_data_states_the_reason(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("checkpoints", "evaluations.jsonl", "report.html"))
    config = make_config(bare, tmp_path / "gone")
    (bare / "config.yaml").write_text(dump_config(config))
    (bare / "checkpoints").mkdir()
    for rename, reasons in (
        (False, ("gone/manifest.json: missing", "no complete checkpoint yet", "no evaluation with neighbours yet")),
        (True, ("config.yaml: missing",)),
    ):
        if rename:
            (bare / "config.yaml").unlink()
        assert main(["report", str(bare), "--out", str(tmp_path / "page.html")]) == 0
        html = (tmp_path / "page.html").read_text()
        for reason in (*reasons, "This run has not been evaluated"):
            assert reason in html, reason


@pytest.mark.slow
def test_online_evaluations_share_one_row_and_can_provide_neighbours(run: Path, tmp_path: Path) -> None:
    (line,) = read_results(run)
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for step in (10, 20):
        append_result(folder, {**line, "protocol": ONLINE, "step": step, "top1": step / 100})
    assert main(["report", str(folder), "--videos", "1"]) == 0
    html = (folder / "report.html").read_text()
    (row,) = [row for row in Tables(html).rows if row and row[0].startswith("online kNN")]
    assert row[2].startswith("20.00%")
    assert "Source: online kNN, step 20" in html


def test_rows_of_one_protocol_show_the_settings_that_differ(run: Path) -> None:
    (line,) = read_results(run)
    other = {**line, "settings": {**line["settings"], "knn": {**line["settings"]["knn"], "neighbours": 1}}}
    split = line["splits"][0]
    rows = [row[0] for row in Tables(evaluations_section([line, other])).rows if row and row[0].startswith("knn")]
    assert rows == ["knn: 1 clips × 1 crops, knn.neighbours 1", "knn: 1 clips × 1 crops, knn.neighbours 20"]
    assert "classes, worst first" in evaluations_section([line])
    assert "classes, worst first" not in evaluations_section([{**line, "splits": [split, split]}])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{tmp}/nothing"], EXIT_FAILURE, "no such run folder"),
        (["{tmp}"], EXIT_FAILURE, "no run has written there yet"),
        (["{tmp}", "--videos", "0"], EXIT_USAGE, "--videos: found 0"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["report", *(argument.format(tmp=tmp_path) for argument in arguments)]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_names_are_escaped_and_nothing_is_loaded_from_outside(html: str) -> None:
    elements = Elements(html).found
    assert "script" not in {tag for tag, _ in elements}
    assert escape("default-src 'none'") in html
    links = [attributes[name] or "" for _, attributes in elements for name in attributes if name in ("src", "href")]
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert all(link.startswith("data:image/") for link in re.findall(r"url\(([^)]*)\)", html))
    names = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(names) == len(set(names))


def test_ticks_are_round_and_cover_the_values() -> None:
    assert ticks(0.3, 7.9) == [0, 2, 4, 6, 8]
    assert ticks(1, 240, 6)[-1] >= 240
    assert ticks(5.0, 5.0)[0] < 5 < ticks(5.0, 5.0)[-1]
    assert "No value yet" in chart("Losses", "nats", [1], [Curve("total", [None])], (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_the_page_without_errors_requests_or_overflow(page: Path, tmp_path: Path, width: int) -> None:
    frame = tmp_path / "frame.html"
    measure = "document.title=document.querySelector('iframe').contentDocument.documentElement.scrollWidth"
    style = f"border:0;width:{width}px;height:3000px"
    frame.write_text(f'<iframe src="{page.as_uri()}" style="{style}" onload="{measure}"></iframe>')
    # Every request would fail to resolve its host and log an error on the console.
    options = ("--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars")
    result = chromium(tmp_path / "profile", frame.as_uri(), *options, "--dump-dom")
    assert "CONSOLE" not in result.stderr
    assert f"<title>{width}</title>" in result.stdout


def test_a_remote_set_is_read_by_byte_ranges_and_nothing_is_kept(
    run: Path, synthetic_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.filesystem("memory").put(str(synthetic_shards), "/reported", recursive=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "report.html"))
    text = dump_config(make_config(folder, Path("elsewhere"))).replace("elsewhere", "memory://reported")
    (folder / "config.yaml").write_text(text)
    assert main(["report", str(folder), "--videos", "1"]) == 0
    assert "Motion-focused draws of 1 videos of memory://reported" in (folder / "report.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
