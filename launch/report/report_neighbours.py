"""Test videos with their nearest training videos on a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

from dataloading.loader.config import DataConfig
from dataloading.reading.shard_set import ShardSet
from dataloading.visualize import pictures
from launch.evaluation.results_log import ON_THE_WAY
from launch.report.html import Markup, joined, jpeg_uri, tag
from mcl_dist.errors import UserError
from mcl_dist.storage.store_requests import without_credentials

NUM_FRAMES = 3
SIDE = 144  # of a frame's longer side, pixels
STYLE = """
.strip{display:grid;gap:.4rem;grid-template-columns:repeat(6,minmax(0,9rem));align-items:start;margin:0 0 1rem}
.strip figure{border-top:.25rem solid var(--line);padding-top:.25rem}
.strip figcaption{line-height:1.25;overflow-wrap:anywhere}
.strip .right{border-color:var(--good)}.strip .wrong{border-color:var(--bad)}
.strip .right b{color:var(--good)}.strip .wrong b{color:var(--bad)}
@media(max-width:36rem){.strip{grid-template-columns:repeat(3,1fr)}}
"""


def neighbours(evaluations: Sequence[dict[str, Any]], data: DataConfig) -> Markup:
    """Strips of the newest evaluation that has some.

    Raises:
        UserError: there is none, or its sets cannot be read or have changed.
    """
    known = [line for line in evaluations if any(line.get("neighbours") or [])]
    if not known:
        raise UserError(
            "no evaluation has compared test with training videos yet; `mcl evaluate knn --checkpoint RUN "
            "--train URL --test URL` does, and so does evaluate.every"
        )
    line = known[-1]
    split, found = line["splits"][0], line["neighbours"][0]
    with ExitStack() as opened:
        train, test = (
            opened.enter_context(closing(ShardSet(split[name], data.cache, data))) for name in ("train", "test")
        )
        strips = [_strip(train, test, each) for each in found]
    which = "on the way" if line["protocol"] == ON_THE_WAY else f"of mcl evaluate {line['protocol']}"
    right = sum(label == each["label"] for each in found for label in each["labels"])
    total = sum(len(each["labels"]) for each in found)
    return joined(
        tag(
            "p",
            f"First a test video, then the training videos whose features have the largest cosine with its own; each "
            f"as its first, middle and last frame. From the evaluation {which}, "
            + (f"after {line['step']:,} steps" if line.get("step") is not None else "of this run")
            + f", on {without_credentials(split['test'])} in {without_credentials(split['train'])}. Of the neighbours "
            f"shown, {right} of {total} have the test video's class.",
            class_="soft",
        ),
        *strips,
    )


def _strip(train: ShardSet, test: ShardSet, found: dict[str, Any]) -> Markup:
    own = _figure(test, found["video"], found["label"], "test video", "")
    rows = zip(found["nearest"], found["labels"], found["cosines"], strict=True)
    others = (
        _figure(train, position, label, f"cos {cosine:.3f}", "right" if label == found["label"] else "wrong")
        for position, label, cosine in rows
    )
    return tag("div", own, *others, class_="strip")


def _figure(shard_set: ShardSet, position: int, label: int, words: str, verdict: str) -> Markup:
    if position >= len(shard_set) or int(shard_set.labels[position]) != label:
        raise UserError("the sets are no longer those that were evaluated; evaluate again")
    name = shard_set.manifest.classes[label]
    frames = pictures(shard_set.read(position), NUM_FRAMES, SIDE)
    mark = {"right": "✓ same class", "wrong": "✗ other class"}.get(verdict, "")
    caption = [name, tag("br"), words, *([tag("br"), tag("b", mark)] if mark else [])]
    images = (tag("img", src=jpeg_uri(frame), alt=f"{name}, {words}") for frame in frames)
    return tag("figure", *images, tag("figcaption", *caption), class_=verdict or "own")
