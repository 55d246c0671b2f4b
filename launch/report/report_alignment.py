"""Where the alignment map looks and where the video moves, at each checkpoint that is kept (METHOD.md, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch

from dataloading.loader.loader import TubeletLoader
from launch.report.html import Markup, joined, jpeg_uri, png_uri, tag
from launch.report.video_card import heat_colours
from launch.run.config import PretrainConfig
from launch.terminal.units import number
from mcl_dist.batch import FIRST_KEY, QUERY, TubeletBatch
from mcl_dist.checkpoint import Snapshot, read_snapshot, restore
from mcl_dist.checkpoint.format import COMMITTED, step_folder, steps_in
from mcl_dist.config import build_config
from mcl_dist.errors import UserError
from mcl_dist.model.encoder import EncoderConfig, normalise
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.objective.alignment import Alignment, align, alignment_map, similarity_gradient
from mcl_dist.storage.folder import Folder

NUM_VIDEOS = 8  # normalised together: BatchNorm of training mode wants several
NUM_SHOWN = 3
MOST_CHECKPOINTS = 6
STYLE = """
.maps{display:grid;gap:.25rem .35rem;align-items:center;
grid-template-columns:minmax(3.6rem,max-content) repeat(var(--n),minmax(0,6rem))}
.maps svg{display:block;width:100%;height:auto;border-radius:.2rem}.maps span{font-size:.8rem;color:var(--soft)}
"""


@dataclass(frozen=True)
class AlignmentSnapshot:
    """Where the network of one checkpoint looks.

    Attributes:
        step: steps done.
        maps: float32 (B, T', H', W').
        agreed: with the targets.
    """

    step: int
    maps: np.ndarray
    agreed: Alignment


def alignment(config: PretrainConfig, checkpoints: str) -> Markup:
    """Maps beside targets for a few training videos, the same at every checkpoint.

    Raises:
        UserError: no complete checkpoint, or the training set cannot be read.
    """
    folder = Folder(checkpoints)
    steps = [step for step in steps_in(folder) if folder.exists(f"{step_folder(step)}/{COMMITTED}")]
    if not steps:
        raise UserError(f"{folder.url}: no complete checkpoint yet")
    batch = _some_videos(config)
    looks = [look(read_snapshot(f"{folder.url}/{step_folder(step)}"), batch) for step in _some(steps)]
    return tag("div", _how_to_read(config, len(batch.order)), _agreements(looks), _videos(batch, looks))


def look(snapshot: Snapshot, batch: TubeletBatch) -> AlignmentSnapshot:
    """The alignment map M of a checkpoint's query network for a batch, and how far it agrees with the targets D."""
    query, key = (_restored(snapshot, side) for side in ("query", "key"))
    with torch.no_grad():
        first_key = key(normalise(batch.views[:, FIRST_KEY])).inter.vector
        output = query(normalise(batch.views[:, QUERY]))
        maps = alignment_map(similarity_gradient(query, output, first_key))
    return AlignmentSnapshot(snapshot.step, maps.numpy(), align(maps, batch.motion))


def _restored(snapshot: Snapshot, side: str) -> Network:
    """One side's network as it trains; a process may be one of several ranks, but looks alone."""
    encoder = replace(build_config(EncoderConfig, snapshot.config["encoder"]), batch_norm="local")
    network = Network(encoder, build_config(HeadsConfig, snapshot.config["heads"])).train()
    parameters = snapshot.network if side == "query" else snapshot.momentum
    restore(network, parameters, snapshot.statistics, side, f"checkpoint of step {snapshot.step}")
    return network


def _some_videos(config: PretrainConfig) -> TubeletBatch:
    """A few videos of the run's first epoch, as it draws, cuts and colours them."""
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


def _some(steps: Sequence[int]) -> list[int]:
    """At most so many of the checkpoints, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(steps) - 1, min(len(steps), MOST_CHECKPOINTS)).round().astype(int)
    return [steps[place] for place in places.tolist()]


def _how_to_read(config: PretrainConfig, num_videos: int) -> Markup:
    layer = config.objective.alignment_layer
    own = "" if layer is None else f" This run aligns {layer}; the maps are those of the last convolution all the same."
    weight = " This run's alignment has weight 0." if config.objective.alignment == 0 else ""
    return tag(
        "p",
        "Query clips of training videos in four groups of frames; below them the target D, where the clip moves, and "
        "at each kept checkpoint the map M, where the similarity of query and first key looks. Each row has a scale of "
        f"its own, from nothing (dark) to its strongest cell (bright). {num_videos} videos are normalised together, "
        f"as in training.{own}{weight}",
        class_="soft",
    )


def _agreements(looks: Sequence[AlignmentSnapshot]) -> Markup:
    head = ("checkpoint", "space and time", "space", "time")
    rows = ((f"step {each.step:,}", *(f"{number(float(value.mean()))}" for value in each.agreed[1:])) for each in looks)
    return tag(
        "div",
        tag("p", "Cosine of M with D, mean over the videos:"),
        tag(
            "table",
            tag("tr", *(tag("th", word) for word in head)),
            *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows),
        ),
        class_="scroll",
    )


def _videos(batch: TubeletBatch, looks: Sequence[AlignmentSnapshot]) -> Markup:
    shown = range(min(NUM_SHOWN, len(batch.order)))
    return tag("div", *(_video(batch, looks, place) for place in shown), class_="grid")


def _video(batch: TubeletBatch, looks: Sequence[AlignmentSnapshot], place: int) -> Markup:
    clip, target = batch.views[place, QUERY].numpy(), batch.motion[place].numpy()
    groups = len(target)
    frames = [clip[int((group + 0.5) * len(clip) / groups)] for group in range(groups)]
    name, side = f"clip-{place}", frames[0].shape[0]
    pictures = [
        tag("image", id=f"{name}-{group}", href=jpeg_uri(frame), width=side, height=side)
        for group, frame in enumerate(frames)
    ]
    rows = [joined(tag("span", "frames"), *(_svg(side, "frame", picture) for picture in pictures))]
    rows.append(_row("D", f"target D of video {place + 1}", target, name, side))
    for each in looks:
        agreed = float(each.agreed.spatiotemporal[place])
        label = joined(f"M, step {each.step:,}", tag("br"), f"cos {agreed:.2f}")
        rows.append(_row(label, f"map M of video {place + 1} at step {each.step}", each.maps[place], name, side))
    return tag("figure", tag("div", *rows, class_="maps", style=f"--n:{groups}"))


def _row(label: str, said: str, maps_thw: np.ndarray, name: str, side: int) -> Markup:
    strongest = max(float(maps_thw.max()), 1e-12)
    scaled = np.asarray(np.rint(maps_thw * (255 / strongest)), dtype=np.uint8)
    cells = (
        _svg(side, said, tag("use", href=f"#{name}-{group}"), _heat(values, side))
        for group, values in enumerate(scaled)
    )
    return joined(tag("span", label), *cells)


def _heat(values_hw: np.ndarray, side: int) -> Markup:
    """A map over its frame: the stronger, the brighter and the less clear."""
    cells = np.dstack([heat_colours(values_hw), np.asarray(110 + values_hw * 0.4, dtype=np.uint8)])
    return tag("image", href=png_uri(cells), preserveAspectRatio="none", class_="pixels", width=side, height=side)


def _svg(side: int, label: str, *children: Markup) -> Markup:
    return tag("svg", *children, viewBox=f"0 0 {side} {side}", role="img", aria_label=label)
