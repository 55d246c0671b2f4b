"""The page of `mcl shards inspect`: one file of HTML, without scripts and without requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby

import numpy as np

from dataloading.colourwheel import colour_wheel
from dataloading.inspect import InspectedVideo
from dataloading.shards import Manifest
from dataloading.stream import ShardSet
from launch.inspect_video import facts, heat_colours, video_card
from launch.markup import Markup, joined, png_uri, tag

# The browser itself refuses whatever is not inside the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
NUM_REFUSED_SHOWN = 20
WHEEL_SIZE = 96

STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--soft:#5b6670;--paper:#f6f7f8;--card:#fff;--line:#d9dee3;
--accent:#0b6bcb;--fill:#0b6bcb26}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--soft:#9aa6b2;--paper:#12161a;--card:#1b2127;
--line:#323b44;--accent:#5eb1ff;--fill:#5eb1ff33}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.4rem;margin:.2rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0 0 .5rem;overflow-wrap:anywhere}
h3{font-size:.95rem;margin:1.2rem 0 .3rem}
p{margin:.2rem 0 .5rem;max-width:60rem}
.soft,figcaption,dt{color:var(--soft)}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:1rem;margin:0 0 1rem}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.grid>.card{margin:0}.grid{margin-bottom:1rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .9rem;margin:0}
dd{margin:0;overflow-wrap:anywhere}
.moments{display:grid;gap:.5rem;grid-template-columns:repeat(8,1fr)}
@media(min-width:50rem){section>dl.wide{grid-template-columns:max-content 1fr max-content 1fr}}
@media(max-width:50rem){.moments{grid-template-columns:repeat(4,1fr)}}
figure{margin:0}figcaption{font-size:.8rem}
figure svg,figure img{display:block;width:100%;height:auto;border-radius:.2rem;margin-bottom:.2rem}
.view{display:grid;gap:.3rem;grid-template-columns:repeat(3,1fr);align-items:start}
.pixels{image-rendering:pixelated}
.legend,.legend span{display:flex;gap:.2rem .8rem;align-items:center}.legend{flex-wrap:wrap}
.wheel{width:4rem;height:4rem;flex:none;background-size:cover}
.heat{width:8rem;height:.8rem;border-radius:.2rem;flex:none;background-size:100% 100%}
.curve{display:block;width:100%;max-width:36rem;height:auto}
.curve text{font-size:11px;fill:var(--soft)}
.curve .line{fill:none;stroke:var(--ink);stroke-width:1.2;vector-effect:non-scaling-stroke}
.curve .axis{stroke:var(--line);vector-effect:non-scaling-stroke}
.curve .best{fill:var(--fill)}
.curve .start line{stroke:var(--accent)}.curve .start circle{fill:var(--accent)}
.curve .start text{fill:var(--card);text-anchor:middle;dominant-baseline:central;font-weight:700}
@media(max-width:36rem){.curve text{font-size:14px}.curve circle{r:9px}}
.box{fill:none;stroke:#00d8ff}.region{fill:none;stroke:#fff;stroke-dasharray:4 3}
.box,.region{stroke-width:2;vector-effect:non-scaling-stroke}
.bars{max-height:19rem;overflow:auto;display:grid;gap:.15rem .6rem;align-items:center;
grid-template-columns:minmax(0,max-content) 1fr max-content}
.bars span{overflow-wrap:anywhere}.bars i{display:block;height:.7rem;background:var(--accent);border-radius:.1rem}
.bars b{font-weight:400;text-align:right;font-variant-numeric:tabular-nums}
summary{cursor:pointer}ul{margin:.2rem 0;padding-left:1.2rem;overflow-wrap:anywhere}
"""


def page(url: str, shard_set: ShardSet, videos: Sequence[InspectedVideo], seed: int) -> str:
    """The whole page of a set and a sample of its videos; equal arguments give equal pages."""
    title = f"Shard set {_without_credentials(url)}"
    num_shown = f"{len(videos)} of {len(shard_set)} videos, drawn with seed {seed}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE + _legend_style())),
    )
    body = tag(
        "body",
        tag("h1", title),
        _summary(shard_set),
        tag("h2", num_shown),
        _how_to_read(),
        *(video_card(video) for video in videos),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _without_credentials(url: str) -> str:
    return re.sub(r"://[^/@]*@", "://", url)


def _legend_style() -> str:
    # Once for the whole page, however many videos point at it.
    scale = heat_colours(np.arange(256, dtype=np.uint8)[None])
    return (
        f".wheel{{background-image:url({png_uri(colour_wheel(WHEEL_SIZE))})}}"
        f".heat{{background-image:url({png_uri(scale)})}}"
    )


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
