"""The page of `mcl shards inspect`: a shard set and a sample of its videos."""

from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby

import numpy as np

from dataloading.reading.shard_set import ShardSet
from dataloading.shards.format import Manifest
from dataloading.visualize import VideoInspection
from launch.report.html import SafeHtml, bars, fragment, html_page, tag
from launch.report.video_card import definition_list, legend_style, video_card
from launch.terminal.units import UNKNOWN
from mcl_dist.storage.store_requests import without_credentials

NUM_REFUSED_SHOWN = 20  # for each reason
EXPLANATIONS = (
    "Frames are numbered from 0. Each sample shows a frame, its flow and its frame map.",
    "Flow: the colour wheel gives the direction; no motion is white.",
    "Frame maps: 7×7 cells of motion boundary, in which steady camera motion cancels out.",
    "Curve: clip score by start frame. Bands are the candidate starts: the best half of each half of the video. Marks "
    "are the drawn starts.",
    "Tubelets: four views of three clips; query and first key are two crops of the same clip. The frame map overlays "
    "the frames; the crop is blue, the region of most motion is dashed; the cropped frames are below.",
)


def shard_set_page(url: str, shard_set: ShardSet, videos: Sequence[VideoInspection], seed: int) -> str:
    """The whole page; equal arguments give equal pages."""
    items = (tag("li", text) for text in EXPLANATIONS)
    return html_page(
        f"Shard set {without_credentials(url)}",
        _summary(shard_set),
        tag("h2", f"{len(videos)} of {len(shard_set)} videos, drawn with seed {seed}"),
        tag("details", tag("summary", "How to read the videos below"), tag("ul", *items), class_="card"),
        *(video_card(video) for video in videos),
        style=legend_style(),
    )


def _summary(shard_set: ShardSet) -> SafeHtml:
    manifest = shard_set.manifest
    frames = shard_set.num_frames
    sizes = {f"{width}×{height}" for width, height in zip(shard_set.widths, shard_set.heights, strict=True)}
    totals = {
        "videos": f"{manifest.num_videos:,}",
        "frames": f"{manifest.num_frames:,}",
        "playing time": timedelta(seconds=round(manifest.num_seconds)) if manifest.num_seconds else UNKNOWN,
        "frames per video": f"{frames.min():,} to {frames.max():,}, median {np.median(frames):,.0f}",
        "frame sizes": sizes.pop() if len(sizes) == 1 else f"{len(sizes)} different sizes",
        "shards": f"{len(manifest.shards):,}",
        "bytes": f"{manifest.num_bytes:,}",
        "classes": f"{len(manifest.classes):,}",
        "refused": f"{len(manifest.refused):,}",
    }
    cards = (
        ("Totals", definition_list(totals.items())),
        ("Build configuration", definition_list(manifest.build.items())),
        ("Videos by class", _histogram(manifest.classes, shard_set.labels)),
        ("Refused videos", _refused(manifest)),
    )
    sections = (tag("section", tag("h2", name), content, class_="card") for name, content in cards)
    return tag("div", *sections, class_="grid")


def _histogram(classes: Sequence[str], labels: np.ndarray) -> SafeHtml:
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    maximum = max(counts)
    return bars((name, 100 * count / maximum, f"{count:,}") for name, count in zip(classes, counts, strict=True))


def _refused(manifest: Manifest) -> SafeHtml:
    if not manifest.refused:
        return tag("p", "none")
    ordered = sorted(manifest.refused, key=lambda video: _reason(video.reason))
    parts = []
    for reason, group in groupby(ordered, key=lambda video: _reason(video.reason)):
        videos = list(group)
        rows = [tag("li", video.source, ": ", video.reason) for video in videos[:NUM_REFUSED_SHOWN]]
        if len(videos) > NUM_REFUSED_SHOWN:
            rows.append(tag("li", f"and {len(videos) - NUM_REFUSED_SHOWN:,} more, in manifest.json"))
        parts.append(tag("details", tag("summary", f"{reason}: {len(videos):,}"), tag("ul", *rows)))
    return fragment(*parts)


def _reason(text: str) -> str:
    """The reason of a refusal, without its details."""
    return text.partition(":")[0]
