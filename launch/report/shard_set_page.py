"""The page of `mcl shards inspect`: one file of HTML, without scripts and without requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby

import numpy as np

from dataloading.reading.shard_set import ShardSet
from dataloading.shards.format import Manifest
from dataloading.visualize import InspectedVideo
from launch.report.document import document
from launch.report.html import Markup, joined, tag
from launch.report.video_card import facts, legend_style, video_card

NUM_REFUSED_SHOWN = 20


def page(url: str, shard_set: ShardSet, videos: Sequence[InspectedVideo], seed: int) -> str:
    """The whole page of a set and a sample of its videos; equal arguments give equal pages."""
    title = f"Shard set {_without_credentials(url)}"
    num_shown = f"{len(videos)} of {len(shard_set)} videos, drawn with seed {seed}"
    return document(
        title,
        _summary(shard_set),
        tag("h2", num_shown),
        _how_to_read(),
        *(video_card(video) for video in videos),
        style=legend_style(),
    )


def _without_credentials(url: str) -> str:
    return re.sub(r"://[^/@]*@", "://", url)


def _summary(shard_set: ShardSet) -> Markup:
    manifest = shard_set.manifest
    frames = shard_set.num_frames
    sizes = {f"{width}×{height}" for width, height in zip(shard_set.widths, shard_set.heights, strict=True)}
    totals = {
        "videos": f"{manifest.num_videos:,}",
        "frames": f"{manifest.num_frames:,}",
        "playing time": timedelta(seconds=round(manifest.num_seconds)) if manifest.num_seconds else "not said",
        "frames a video": f"{frames.min():,} to {frames.max():,}, median {np.median(frames):,.0f}",
        "frame sizes": sizes.pop() if len(sizes) == 1 else f"{len(sizes)} different",
        "shards": f"{len(manifest.shards):,}",
        "bytes": f"{manifest.num_bytes:,}",
        "classes": f"{len(manifest.classes):,}",
        "refused": f"{len(manifest.refused):,}",
    }
    cards = (
        ("Totals", facts(totals.items())),
        ("Build configuration", facts(manifest.build.items())),
        ("Videos by class", _histogram(manifest.classes, shard_set.labels)),
        ("Refused videos", _refused(manifest)),
    )
    sections = (tag("section", tag("h2", name), content, class_="card") for name, content in cards)
    return tag("div", *sections, class_="grid")


def _histogram(classes: Sequence[str], labels: np.ndarray) -> Markup:
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    most = max(counts)
    rows = (
        joined(tag("span", name), tag("i", style=f"width:{100 * count / most:.1f}%"), tag("b", f"{count:,}"))
        for name, count in zip(classes, counts, strict=True)
    )
    return tag("div", *rows, class_="bars")


def _refused(manifest: Manifest) -> Markup:
    if not manifest.refused:
        return tag("p", "none")
    ordered = sorted(manifest.refused, key=lambda video: _kind(video.reason))
    parts = []
    for kind, group in groupby(ordered, key=lambda video: _kind(video.reason)):
        videos = list(group)
        rows = [tag("li", video.source, ": ", video.reason) for video in videos[:NUM_REFUSED_SHOWN]]
        if len(videos) > NUM_REFUSED_SHOWN:
            rows.append(tag("li", f"and {len(videos) - NUM_REFUSED_SHOWN:,} more, in manifest.json"))
        parts.append(tag("details", tag("summary", f"{kind}: {len(videos):,}"), tag("ul", *rows)))
    return joined(*parts)


def _kind(reason: str) -> str:
    return reason.partition(":")[0]


def _how_to_read() -> Markup:
    return tag(
        "details",
        tag("summary", "How to read the videos below"),
        tag(
            "ul",
            tag("li", "Frames are numbered from 0. Each moment shows its frame, its flow and its frame map."),
            tag("li", "Flow: a direction has the colour of that place of the wheel; what stands still is white."),
            tag("li", "Frame maps: 7×7 cells of motion boundary, which a steady camera does not have."),
            tag(
                "li",
                "Curve: the score of the clip that starts at each frame. Bands hold the starts to choose among: "
                "the best half of each half of the video. Marks are the starts drawn.",
            ),
            tag(
                "li",
                "Tubelets: four views of three clips, the query and the first key being two crops of one. The "
                "frame map lies over the frames; blue is the crop, dashed where the clip moves most; the cut-out is "
                "below.",
            ),
        ),
        class_="card",
    )
