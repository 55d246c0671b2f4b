"""Section "Alignment" of a run's report: alignment maps and motion targets by checkpoint (METHOD.md, section 4)."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dataloading.loader.loader import TubeletLoader
from launch.report.html import SafeHtml, fragment, jpeg_uri, tag
from launch.report.video_card import heat_overlay, svg_image
from launch.run.config import PretrainConfig
from launch.terminal.units import format_number
from mcl_dist.batch import FIRST_KEY, QUERY, TubeletBatch
from mcl_dist.checkpoint import Snapshot, read_snapshot, restore
from mcl_dist.checkpoint.format import COMMITTED, step_folder, steps_in
from mcl_dist.config import build_config
from mcl_dist.errors import UserError
from mcl_dist.model.encoder import EncoderConfig, normalise
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.objective.alignment import Alignment, align, alignment_map, similarity_gradient
from mcl_dist.storage.folder import Folder

NUM_VIDEOS = 8  # in one batch, because BatchNorm in training mode needs several
NUM_SHOWN = 3
MAX_CHECKPOINTS = 6
STYLE = """
.maps{display:grid;gap:.25rem .35rem;align-items:center;
grid-template-columns:minmax(3.6rem,max-content) repeat(var(--n),minmax(0,6rem))}
.maps svg{display:block;width:100%;height:auto;border-radius:.2rem}.maps span{font-size:.8rem;color:var(--soft)}
"""


@dataclass(frozen=True)
class CheckpointAlignment:
    """Alignment maps of one checkpoint, and their agreement with the motion targets."""

    step: int
    maps: np.ndarray  # float32 (B, T', H', W')
    agreement: Alignment


def alignment_section(config: PretrainConfig, run_folder: Path) -> SafeHtml:
    """Alignment maps and motion targets of a few training videos, the same for every checkpoint.

    Raises:
        UserError: there is no complete checkpoint, or the training set cannot be read.
    """
    folder = Folder(config.checkpoint.folder or str(run_folder / "checkpoints"))
    steps = [step for step in steps_in(folder) if folder.exists(f"{step_folder(step)}/{COMMITTED}")]
    if not steps:
        raise UserError(f"{folder.url}: no complete checkpoint yet")
    batch = _load_batch(config)
    snapshots = (read_snapshot(f"{folder.url}/{step_folder(step)}") for step in _evenly_spaced(steps))
    measured = [measure_alignment(snapshot, batch) for snapshot in snapshots]
    videos = (_video(batch, measured, position) for position in range(min(NUM_SHOWN, len(batch.order))))
    grid = tag("div", *videos, class_="grid")
    return tag("div", _explanation(config, len(batch.order)), _agreement_table(measured), grid)


def measure_alignment(snapshot: Snapshot, batch: TubeletBatch) -> CheckpointAlignment:
    """Alignment maps M of a checkpoint's query network for a batch, and their agreement with the motion targets D."""
    query, key = (_restore_network(snapshot, side) for side in ("query", "key"))
    with torch.no_grad():
        first_key = key(normalise(batch.views[:, FIRST_KEY])).inter.vector
        output = query(normalise(batch.views[:, QUERY]))
        maps = alignment_map(similarity_gradient(query, output, first_key))
    return CheckpointAlignment(snapshot.step, maps.numpy(), align(maps, batch.motion))


def _restore_network(snapshot: Snapshot, side: str) -> Network:
    """One side's network in training mode, with local BatchNorm, as other ranks of the process do not take part."""
    encoder = replace(build_config(EncoderConfig, snapshot.config["encoder"]), batch_norm="local")
    network = Network(encoder, build_config(HeadsConfig, snapshot.config["heads"])).train()
    parameters = snapshot.network if side == "query" else snapshot.momentum
    restore(network, parameters, snapshot.statistics, side, f"checkpoint of step {snapshot.step}")
    return network


def _load_batch(config: PretrainConfig) -> TubeletBatch:
    """A few videos of the run's first epoch, drawn, cropped and augmented as in the run."""
    loader = TubeletLoader(
        replace(config.data, lanes=None, workers=0, prefetch=1),
        seed=config.run.seed,
        global_batch=min(NUM_VIDEOS, config.train.global_batch),
        rank=0,
        num_ranks=1,
        grid=config.encoder.grid(config.data.frames, config.data.crop),
        device=torch.device("cpu"),
    )
    with closing(loader):
        return next(iter(loader))


def _evenly_spaced(steps: Sequence[int]) -> list[int]:
    """At most MAX_CHECKPOINTS of the steps, with the first and the last."""
    positions = np.linspace(0, len(steps) - 1, min(len(steps), MAX_CHECKPOINTS)).round().astype(int)
    return [steps[position] for position in positions.tolist()]


def _explanation(config: PretrainConfig, num_videos: int) -> SafeHtml:
    layer = config.objective.alignment_layer
    other_layer = "" if layer is None else f" This run aligns {layer}, but the maps are those of the last convolution."
    no_weight = " The alignment loss of this run has weight 0." if config.objective.alignment == 0 else ""
    return tag(
        "p",
        "Query clips of training videos in four groups of frames. Below them: the motion target D (motion of the clip) "
        "and for each kept checkpoint the alignment map M (where the similarity of query and first key depends on the "
        "features). Each row has its own colour scale, from 0 (dark) to its maximum (bright). "
        f"{num_videos} videos form a batch for BatchNorm, as in training.{other_layer}{no_weight}",
        class_="soft",
    )


def _agreement_table(measured: Sequence[CheckpointAlignment]) -> SafeHtml:
    head = ("checkpoint", "space and time", "space", "time")
    rows = (
        (f"step {each.step:,}", *(f"{format_number(float(value.mean()))}" for value in each.agreement[1:]))
        for each in measured
    )
    names = tag("tr", *(tag("th", name) for name in head))
    table = tag("table", names, *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows))
    return tag("div", tag("p", "Cosine of M and D, mean over the videos:"), table, class_="scroll")


def _video(batch: TubeletBatch, measured: Sequence[CheckpointAlignment], position: int) -> SafeHtml:
    clip, target = batch.views[position, QUERY].numpy(), batch.motion[position].numpy()
    groups = len(target)
    frames = [clip[int((group + 0.5) * len(clip) / groups)] for group in range(groups)]
    name, side = f"clip-{position}", frames[0].shape[0]
    images = [
        tag("image", id=f"{name}-{group}", href=jpeg_uri(frame), width=side, height=side)
        for group, frame in enumerate(frames)
    ]
    rows = [fragment(tag("span", "frames"), *(svg_image(side, side, image, label="frame") for image in images))]
    rows.append(_row("D", f"target D of video {position + 1}", target, name, side))
    for each in measured:
        cosine = float(each.agreement.spatiotemporal[position])
        label = fragment(f"M, step {each.step:,}", tag("br"), f"cos {cosine:.2f}")
        rows.append(_row(label, f"map M of video {position + 1} at step {each.step}", each.maps[position], name, side))
    return tag("figure", tag("div", *rows, class_="maps", style=f"--n:{groups}"))


def _row(label: str, description: str, maps_thw: np.ndarray, name: str, side: int) -> SafeHtml:
    maximum = max(float(maps_thw.max()), 1e-12)
    scaled = np.asarray(np.rint(maps_thw * (255 / maximum)), dtype=np.uint8)
    frames = (tag("use", href=f"#{name}-{group}") for group in range(len(scaled)))
    overlays = (heat_overlay(values, 110 + values * 0.4, side, side) for values in scaled)
    pairs = zip(frames, overlays, strict=True)
    return fragment(tag("span", label), *(svg_image(side, side, *pair, label=description) for pair in pairs))
