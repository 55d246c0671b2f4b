"""The page of `mcl report`: its parts in order, each with what it shows or why it has nothing to show."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from dataloading.reading.shard_set import ShardSet
from dataloading.visualize import inspect_video, sample_positions
from launch.evaluation.results_log import kept
from launch.report import report_alignment, report_evaluations, report_neighbours
from launch.report import svg_chart as chart
from launch.report.document import document
from launch.report.html import Markup, joined, tag
from launch.report.report_alignment import alignment
from launch.report.report_curves import curves
from launch.report.report_evaluations import evaluations
from launch.report.report_neighbours import neighbours
from launch.report.video_card import facts, legend_style, tubelets
from launch.run.config import PretrainConfig
from launch.terminal.units import UNKNOWN, counted, duration, number, ratio, size
from mcl_dist.config import RUN_CONFIG, load_config
from mcl_dist.errors import UserError
from mcl_dist.storage.store_requests import without_credentials
from monitoring.history.run_folder import RunFolder
from monitoring.history.run_view import RunView

WITH_STYLE = (chart, report_evaluations, report_alignment, report_neighbours)
STYLE = """
:root{--good:#1a7f37;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--good:#5fd38a;--bad:#ff8a80}}
h2{margin-top:.2rem}
details{margin:.6rem 0}summary{margin-bottom:.4rem}.card>.grid{margin-top:.6rem}.grid>figure{min-width:0}
.absent{border-left:.25rem solid var(--line);padding-left:.7rem;color:var(--soft);overflow-wrap:anywhere}
.scroll{overflow-x:auto}.scroll+.grid{margin-top:1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem .2rem 0;border-bottom:1px solid var(--line);text-align:right}
th{color:var(--soft);font-weight:500}th:first-child,td:first-child{text-align:left}
pre{overflow:auto;max-height:30rem;font-size:.8rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:0 0 1rem}a{color:var(--accent)}
"""


def report(folder: Path, num_videos: int, cache: str | None = None) -> str:
    """The whole page of a run.

    Args:
        folder: of the run.
        num_videos: whose tubelets are shown.
        cache: local folder for indices of sets that are elsewhere, instead of the run's.

    Raises:
        UserError: there is no run.
    """
    view = RunFolder(folder).view()
    lines = kept(folder)
    with TemporaryDirectory() as temporary:

        def config() -> PretrainConfig:
            return _config(folder, cache, temporary)

        parts = (
            ("configuration", "Configuration", lambda: _configuration(folder, config())),
            ("curves", "Curves", lambda: curves(view)),
            ("evaluations", "Evaluations", lambda: evaluations(lines)),
            ("tubelets", "Tubelets", lambda: _tubelets(config(), num_videos)),
            ("alignment", "Where the alignment map looks", lambda: _alignment(config(), folder)),
            ("neighbours", "Nearest neighbours", lambda: neighbours(lines, config().data)),
        )
        sections = [_part(*part) for part in parts]
    return document(
        f"Run {view['run']}",
        _summary(view),
        tag("nav", *(tag("a", title, href=f"#{name}") for name, title, _ in parts)),
        *sections,
        style=legend_style() + STYLE + "".join(part.STYLE for part in WITH_STYLE),
    )


def _config(folder: Path, cache: str | None, temporary: str) -> PretrainConfig:
    """The run's configuration, with sets read where they lie, a few stills at a time.

    Raises:
        UserError: the run folder has none.
        ConfigError: it is not one.
    """
    path = folder / RUN_CONFIG
    if not path.is_file():
        raise UserError(f"{path}: missing; the run's own configuration says what there is to show")
    config = load_config(PretrainConfig, path)
    return replace(config, data=replace(config.data, fetch="ranges", cache=cache or config.data.cache or temporary))


def _part(name: str, title: str, make: Callable[[], Markup]) -> Markup:
    """A part of the page; what keeps it from being there is told in its place."""
    try:
        content = make()
    except UserError as error:
        content = tag("p", f"Not here: {without_credentials(str(error))}", class_="absent")
    return tag("section", tag("h2", title), content, class_="card", id=name)


def _summary(view: RunView) -> Markup:
    rows = [
        ("state", view["state"] + (f": {view['why']}" if view["why"] else "")),
        ("steps", f"{view['step']:,}" + (f" of {view['total_steps']:,}" if view["total_steps"] else "")),
        ("last step", _moment(view["updated"])),
        ("goodput", f"{ratio(view['goodput'])} of the time went into steps that count"),
        ("restarts", counted(view["restarts"])),
        ("steps skipped", f"{view['counts']['skipped']:,}"),
        ("step time", f"{duration(view['latest'].get('seconds'))}, {number(view['latest'].get('videos_per_second'))} "
         "videos/s in the last"),
        ("page made", _moment(view["now"])),
    ]  # fmt: skip
    if (checkpoint := view["checkpoint"]) is not None:
        rows.insert(3, ("checkpoint", f"step {checkpoint['step']:,}, {size(checkpoint['bytes'])}"))
    return tag("section", facts(rows, "wide"), class_="card", id="summary")


def _moment(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _configuration(folder: Path, config: PretrainConfig) -> Markup:
    train, encoder, optimizer, data = config.train, config.encoder, config.optimizer, config.data
    losses, rate = config.objective, optimizer.base_rate(train.global_batch)
    length = f"{train.steps:,} steps" if train.steps else f"{train.epochs:,} epochs"
    rows = [
        ("trained on", without_credentials(", ".join(part.url for part in data.all_sets))),
        ("clips", f"{data.frames} frames every {data.stride}, {data.crop}×{data.crop} pixels"),
        ("motion-focused", f"{data.motion_probability:.0%} of the draws"),
        ("encoder", f"width {encoder.width}, blocks {'-'.join(map(str, encoder.blocks))}"),
        ("BatchNorm", encoder.batch_norm),
        ("length", f"{length}, global batch {train.global_batch}"),
        ("optimizer", f"{optimizer.name}, rate {rate:g}, decay {optimizer.weight_decay:g}"),
        ("loss weights", f"intra {losses.intra:g}, alignment {losses.alignment:g}, order {losses.order}"),
        ("queue", f"{losses.queue:,} keys, momentum {losses.momentum:g}, temperature {losses.temperature:g}"),
        ("precision", train.precision),
        ("seed", config.run.seed),
    ]  # fmt: skip
    everything = without_credentials((folder / RUN_CONFIG).read_text())
    return joined(facts(rows, "wide"), tag("details", tag("summary", "all of it, as YAML"), tag("pre", everything)))


def _tubelets(config: PretrainConfig, num_videos: int) -> Markup:
    url = config.data.all_sets[0].url
    with closing(ShardSet(url, config.data.cache, config.data)) as shard_set:
        positions = sample_positions(len(shard_set), num_videos, config.run.seed)
        videos = [inspect_video(shard_set, position, config.run.seed) for position in positions]
    heat = tag("i", class_="heat", role="img", aria_label="colours of the frame maps")
    return joined(
        tag("p", f"Motion-focused draws of {len(videos)} videos of {without_credentials(url)}. The four views of each: "
            "the frame map lies over the frames, blue is the crop, dashed the box of the cells that move most; what is "
            "cut out is below.", class_="soft"),
        tag("p", tag("span", heat, "motion boundary, none to the video's strongest"), class_="legend soft"),
        *(_folded(f"{video.class_name}, {video.key}", tubelets(video), place) for place, video in enumerate(videos)),
    )  # fmt: skip


def _folded(title: str, content: Markup, place: int) -> Markup:
    """One of several alike: the first lies open."""
    opened = {} if place else {"open": ""}
    return tag("details", tag("summary", tag("b", title)), content, **opened)


def _alignment(config: PretrainConfig, folder: Path) -> Markup:
    return alignment(config, config.checkpoint.folder or str(folder / "checkpoints"))
