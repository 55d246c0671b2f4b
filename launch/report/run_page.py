"""The page of `mcl report`: its sections in order, each with its content or the reason why it is missing."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from dataloading.reading.shard_set import ShardSet
from dataloading.visualize import inspect_video, sample_positions
from launch.evaluation.results_log import read_results
from launch.report import report_alignment, report_evaluations, report_neighbours, svg_chart
from launch.report.html import SafeHtml, fragment, html_page, tag
from launch.report.report_alignment import alignment_section
from launch.report.report_curves import curves_section
from launch.report.report_evaluations import evaluations_section
from launch.report.report_neighbours import neighbours_section
from launch.report.video_card import definition_list, legend_style, tubelet_views
from launch.run.config import PretrainConfig
from launch.terminal.units import UNKNOWN, format_bytes, format_counts, format_duration, format_number, format_percent
from mcl_dist.config import RUN_CONFIG, load_config
from mcl_dist.errors import UserError
from mcl_dist.storage.store_requests import without_credentials
from monitoring.history.run_folder import RunFolder
from monitoring.history.run_view import RunView

MODULES_WITH_STYLE = (svg_chart, report_evaluations, report_alignment, report_neighbours)
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


def run_page(folder: Path, num_videos: int, cache: str | None = None) -> str:
    """The whole page of a run, with tubelets of `num_videos` videos; raises UserError if the folder holds no run.

    `cache` is a local folder for indices of remote shard sets; by default the run's cache, or a temporary folder.
    """
    view = RunFolder(folder).view()
    results = read_results(folder)
    with TemporaryDirectory() as temporary:
        config = partial(_load_config, folder, cache, temporary)
        sections = (
            ("configuration", "Configuration", lambda: _configuration(folder, config())),
            ("curves", "Learning curves", lambda: curves_section(view)),
            ("evaluations", "Evaluations", lambda: evaluations_section(results)),
            ("tubelets", "Tubelets", lambda: _tubelets(config(), num_videos)),
            ("alignment", "Alignment", lambda: alignment_section(config(), folder)),
            ("neighbours", "Nearest neighbours", lambda: neighbours_section(results, config().data)),
        )
        rendered = [_section(*section) for section in sections]
    return html_page(
        f"Run {view['run']}",
        _summary(view),
        tag("nav", *(tag("a", title, href=f"#{name}") for name, title, _ in sections)),
        *rendered,
        style=legend_style() + STYLE + "".join(module.STYLE for module in MODULES_WITH_STYLE),
    )


def _load_config(folder: Path, cache: str | None, temporary: str) -> PretrainConfig:
    """The run's configuration, changed to read shard sets by byte ranges; raises UserError if the run has none."""
    path = folder / RUN_CONFIG
    if not path.is_file():
        raise UserError(f"{path}: missing; the report needs the run's configuration")
    config = load_config(PretrainConfig, path)
    return replace(config, data=replace(config.data, fetch="ranges", cache=cache or config.data.cache or temporary))


def _section(name: str, title: str, render: Callable[[], SafeHtml]) -> SafeHtml:
    """A section of the page; a UserError is shown in its place."""
    try:
        content = render()
    except UserError as error:
        content = tag("p", f"Not available: {without_credentials(str(error))}", class_="absent")
    return tag("section", tag("h2", title), content, class_="card", id=name)


def _summary(view: RunView) -> SafeHtml:
    rows = [
        ("state", view["state"] + (f": {view['why']}" if view["why"] else "")),
        ("steps", f"{view['step']:,}" + (f" of {view['total_steps']:,}" if view["total_steps"] else "")),
        ("last step", _time(view["updated"])),
        ("goodput", f"{format_percent(view['goodput'])} of the time was productive"),
        ("restarts", format_counts(view["restarts"])),
        ("steps skipped", f"{view['counts']['skipped']:,}"),
        ("step time", format_duration(view["latest"].get("seconds"))),
        ("throughput", f"{format_number(view['latest'].get('videos_per_second'))} videos/s"),
        ("page created", _time(view["now"])),
    ]  # fmt: skip
    if (checkpoint := view["checkpoint"]) is not None:
        rows.insert(3, ("checkpoint", f"step {checkpoint['step']:,}, {format_bytes(checkpoint['bytes'])}"))
    return tag("section", definition_list(rows, "wide"), class_="card", id="summary")


def _time(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _configuration(folder: Path, config: PretrainConfig) -> SafeHtml:
    train, encoder, optimizer, data = config.train, config.encoder, config.optimizer, config.data
    losses, rate = config.objective, optimizer.base_rate(train.global_batch)
    length = f"{train.steps:,} steps" if train.steps else f"{train.epochs:,} epochs"
    rows = [
        ("trained on", without_credentials(", ".join(part.url for part in data.all_sets))),
        ("clips", f"{data.frames} frames at stride {data.stride}, {data.crop}×{data.crop} pixels"),
        ("motion-focused draws", f"{data.motion_probability:.0%}"),
        ("encoder", f"width {encoder.width}, blocks {'-'.join(map(str, encoder.blocks))}"),
        ("BatchNorm", encoder.batch_norm),
        ("length", f"{length}, global batch {train.global_batch}"),
        ("optimizer", f"{optimizer.name}, learning rate {rate:g}, weight decay {optimizer.weight_decay:g}"),
        ("loss weights", f"intra {losses.intra:g}, alignment {losses.alignment:g}, order {losses.order}"),
        ("queue", f"{losses.queue:,} keys, momentum {losses.momentum:g}, temperature {losses.temperature:g}"),
        ("precision", train.precision),
        ("seed", config.run.seed),
    ]  # fmt: skip
    yaml = without_credentials((folder / RUN_CONFIG).read_text())
    complete = tag("details", tag("summary", "complete configuration (YAML)"), tag("pre", yaml))
    return fragment(definition_list(rows, "wide"), complete)


def _tubelets(config: PretrainConfig, num_videos: int) -> SafeHtml:
    url = config.data.all_sets[0].url
    with closing(ShardSet(url, config.data.cache, config.data)) as shard_set:
        positions = sample_positions(len(shard_set), num_videos, config.run.seed)
        videos = [inspect_video(shard_set, position, config.run.seed) for position in positions]
    heat = tag("i", class_="heat", role="img", aria_label="colours of the frame maps")
    return fragment(
        tag("p", f"Motion-focused draws of {len(videos)} videos of {without_credentials(url)}: the four views of each. "
            "The frame map overlays the frames; the crop is blue, the box of the cells with the most motion is dashed; "
            "the cropped frames are below.", class_="soft"),
        tag("p", tag("span", heat, "motion boundary, 0 to the maximum of the video"), class_="legend soft"),
        *(tag("details", tag("summary", tag("b", f"{video.class_name}, {video.key}")), tubelet_views(video),
              **({"open": ""} if index == 0 else {})) for index, video in enumerate(videos)),
    )  # fmt: skip
