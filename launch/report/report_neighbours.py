"""Section "Nearest neighbours" of a run's report: test videos and their nearest training videos."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

from dataloading.loader.config import DataConfig
from dataloading.reading.shard_set import ShardSet
from dataloading.visualize import evenly_spaced_frames
from launch.evaluation.results_log import ONLINE
from launch.report.html import SafeHtml, fragment, jpeg_uri, tag
from mcl_dist.errors import UserError
from mcl_dist.storage.store_requests import without_credentials

NUM_FRAMES = 3
SIDE = 144  # longer side of a frame, pixels
STYLE = """
.strip{display:grid;gap:.4rem;grid-template-columns:repeat(6,minmax(0,9rem));align-items:start;margin:0 0 1rem}
.strip figure{border-top:.25rem solid var(--line);padding-top:.25rem}
.strip figcaption{line-height:1.25;overflow-wrap:anywhere}
.strip .right{border-color:var(--good)}.strip .wrong{border-color:var(--bad)}
.strip .right b{color:var(--good)}.strip .wrong b{color:var(--bad)}
@media(max-width:36rem){.strip{grid-template-columns:repeat(3,1fr)}}
"""


def neighbours_section(evaluations: Sequence[dict[str, Any]], data: DataConfig) -> SafeHtml:
    """Neighbours of the newest evaluation that has them.

    Raises:
        UserError: there is no such evaluation, or its shard sets cannot be read or have changed.
    """
    known = [line for line in evaluations if any(line.get("neighbours") or [])]
    if not known:
        raise UserError(
            "no evaluation with neighbours yet; run `mcl evaluate knn --checkpoint RUN --train URL --test URL`, or set "
            "evaluate.every"
        )
    line = known[-1]
    split, found = line["splits"][0], line["neighbours"][0]
    with ExitStack() as stack:
        sets = (ShardSet(split[name], data.cache, data) for name in ("train", "test"))
        train, test = (stack.enter_context(closing(shard_set)) for shard_set in sets)
        strips = [_strip(train, test, each) for each in found]
    source = "online kNN" if line["protocol"] == ONLINE else f"mcl evaluate {line['protocol']}"
    same_class = sum(label == each["label"] for each in found for label in each["labels"])
    total = sum(len(each["labels"]) for each in found)
    return fragment(
        tag(
            "p",
            "Each strip shows a test video and the training videos with the largest cosine similarity of features, "
            f"each by its first, middle and last frame. Source: {source}, "
            + (f"step {line['step']:,}" if line.get("step") is not None else "this run")
            + f"; test videos of {without_credentials(split['test'])}, training videos of "
            f"{without_credentials(split['train'])}. {same_class} of {total} neighbours have the test video's class.",
            class_="soft",
        ),
        *strips,
    )


def _strip(train: ShardSet, test: ShardSet, found: dict[str, Any]) -> SafeHtml:
    own = _figure(test, found["video"], found["label"], "test video", "")
    rows = zip(found["nearest"], found["labels"], found["cosines"], strict=True)
    others = (
        _figure(train, position, label, f"cos {cosine:.3f}", "right" if label == found["label"] else "wrong")
        for position, label, cosine in rows
    )
    return tag("div", own, *others, class_="strip")


def _figure(shard_set: ShardSet, position: int, label: int, note: str, verdict: str) -> SafeHtml:
    if position >= len(shard_set) or int(shard_set.labels[position]) != label:
        raise UserError("the shard sets have changed since the evaluation; evaluate again")
    name = shard_set.manifest.classes[label]
    frames = evenly_spaced_frames(shard_set.read(position), NUM_FRAMES, SIDE)
    mark = {"right": "✓ same class", "wrong": "✗ other class"}.get(verdict, "")
    caption = [name, tag("br"), note, *([tag("br"), tag("b", mark)] if mark else [])]
    images = (tag("img", src=jpeg_uri(frame), alt=f"{name}, {note}") for frame in frames)
    return tag("figure", *images, tag("figcaption", *caption), class_=verdict or "own")
