"""What evaluations said of a run, beside what others published of theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from launch.evaluation.results_log import ON_THE_WAY
from launch.report.html import Markup, joined, tag
from launch.terminal.units import UNKNOWN
from mcl_dist.storage.store_requests import without_credentials

MOST_CLASSES = 60
NAMES = {ON_THE_WAY: "kNN, on the way"}
STYLE = """
.rows{border-collapse:collapse;width:100%}.rows th,.rows td{text-align:left;vertical-align:top}
.rows td{overflow-wrap:anywhere}
@media(max-width:36rem){.rows thead{display:none}
.rows tr{display:block;padding:.5rem 0;border-bottom:1px solid var(--line)}
.rows td{display:flex;gap:.8rem;border:0;padding:.1rem 0}.rows td::before{content:attr(data-name);flex:0 0 6.5rem;
color:var(--soft);font-weight:400}}
"""


class Published(NamedTuple):
    """A linear classifier's top-1 accuracy on frozen features, as its authors tell it."""

    method: str
    network: str
    pretrained_on: str
    tested_on: str
    top1: str
    source: str


MCL, CVRL, STUDY = "[1]", "[2]", "[3]"
SOURCES = (
    f"{MCL} Li et al., ICCV 2021 (arXiv 2201.04029), abstract, which has ImageNet's supervised encoder 6.78 below MCL "
    "on UCF101",
    f"{CVRL} Qian et al., CVPR 2021 (arXiv 2008.03800), checkpoints in the authors' repository tensorflow/models",
    f"{STUDY} Feichtenhofer et al., CVPR 2021 (arXiv 2104.14558), table in the authors' repository "
    "facebookresearch/SlowFast",
)
PUBLISHED = (
    Published("MCL", "R(2+1)D-50", "not said in the abstract", "UCF101", "81.91 %", MCL),
    Published("ImageNet, supervised", "network not said", "ImageNet labels", "UCF101", "75.13 %", MCL),
    Published("MCL", "R(2+1)D-50", "not said in the abstract", "Kinetics-400", "66.62 %", MCL),
    Published("CVRL", "R3D-50", "Kinetics-400, 800 epochs", "Kinetics-400", "66.1 %", CVRL),
    Published("CVRL", "R3D-50", "Kinetics-400, 200 epochs", "Kinetics-400", "63.8 %", CVRL),
    Published("ImageNet, inflated", "R3D-50", "ImageNet labels", "Kinetics-400", "53.5 %", CVRL),
    Published("ρMoCo, ρ=2", "Slow-only R50, 8×8", "Kinetics-400", "Kinetics-400", "66.6 %", STUDY),
    Published("ρMoCo, ρ=4", "Slow-only R50, 8×8", "Kinetics-400", "Kinetics-400", "71.0 %", STUDY),
    Published("ρBYOL, ρ=4", "Slow-only R50, 16×4", "Kinetics-400", "Kinetics-400", "71.1 %", STUDY),
    Published("SimCLR, ρ=2", "Slow-only R50, 8×8", "Kinetics-400", "Kinetics-400", "61.5 %", STUDY),
    Published("SwAV, ρ=2", "Slow-only R50, 8×8", "Kinetics-400", "Kinetics-400", "62.6 %", STUDY),
)
CAVEATS = (
    "An accuracy compares with another only on the same test set by the same protocol. Those of this run are on the "
    "sets named with them; a set's name or folder does not make it UCF101 or Kinetics-400.",
    "The others' networks, pre-training lengths, clip lengths (8 frames every 8th, 16 every 4th, and so on) and "
    "numbers of test clips and crops differ from one another and from this run's.",
    "MCL starts from MoCo-v2's ImageNet weights, CVRL from random ones.",
    "MCL's Kinetics-400 figure is of a linear layer on clips of 32 frames, its UCF101 figure of a linear classifier on "
    "features: `mcl evaluate svm` follows that one.",
    "kNN and retrieval measure other things than a linear classifier, and have no figure of the paper beside them.",
    "Intervals are of the test videos alone (bootstrap): another seed of pre-training may move a figure further.",
)


def evaluations(lines: Sequence[dict[str, Any]]) -> Markup:
    """This run's evaluations, the newest of each kind, and the literature's."""
    own = _newest(lines)
    if own:
        head = ("protocol", "set", "top-1", "top-5", "mean of classes", "videos", "checkpoint")
        rows = (_own(line, _differing(line, own)) for line in own)
        told = joined(_table(head, rows), *(_classes(line) for line in own))
    else:
        why = "This run has not been evaluated: `mcl evaluate svm --checkpoint RUN --train URL --test URL` does that."
        told = tag("p", why, class_="absent")
    others = ("method", "trained on", "tested on", "top-1")
    return joined(
        tag("h3", "This run"),
        told,
        tag("h3", "Published: linear classifiers on frozen features"),
        _table(others, (_other(each) for each in PUBLISHED)),
        tag("p", *(joined(source, tag("br")) for source in SOURCES), class_="soft"),
        tag("ul", *(tag("li", caveat) for caveat in CAVEATS), class_="soft"),
    )


def _newest(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each protocol, settings, sets and step the last line; of those on the way the last of all."""
    by_kind: dict[str, dict[str, Any]] = {}
    for line in lines:
        is_on_the_way = line["protocol"] == ON_THE_WAY
        sets = [(split.get("train"), split.get("test")) for split in line.get("splits", [])]
        kind = ON_THE_WAY if is_on_the_way else repr((line["protocol"], line.get("settings"), sets, line.get("step")))
        by_kind.pop(kind, None)
        by_kind[kind] = line
    return list(reversed(by_kind.values()))


def _differing(line: dict[str, Any], lines: Sequence[dict[str, Any]]) -> dict[str, object]:
    """Settings of an evaluation in which others of its protocol differ; clips are told of all."""
    settings = [_flat(each.get("settings") or {}) for each in lines if each["protocol"] == line["protocol"]]
    own = _flat(line.get("settings") or {})
    return {
        name: value
        for name, value in own.items()
        if not name.startswith("clips.") and any(each.get(name) != value for each in settings)
    }


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, object]:
    """Values by their full key."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return flat


def _own(line: dict[str, Any], differing: dict[str, object]) -> list[object]:
    splits = line.get("splits", [])
    sets = without_credentials(", ".join(str(split.get("test")) for split in splits))
    step = line.get("step")
    return [
        f"{NAMES.get(line['protocol'], line['protocol'])}{_how(line.get('settings'), differing)}",
        sets + (f" (mean of {len(splits)} splits)" if len(splits) > 1 else ""),
        *(_measure(line, name) for name in ("top1", "top5", "mean_class")),
        f"{line['videos']:,}" if "videos" in line else UNKNOWN,
        "of this run" if step is None else f"step {step:,}",
    ]


def _how(settings: dict[str, Any] | None, differing: dict[str, object]) -> str:
    clips = (settings or {}).get("clips", {})
    words = [f"{clips[name]} {name}" for name in ("frames", "stride", "crop") if clips.get(name)]
    if "count" in clips:
        words.insert(0, f"{clips['count']} clips × {clips['crops']} crops")
    words += [f"{name} {value}" for name, value in differing.items()]
    return f": {', '.join(words)}" if words else ""


def _measure(line: dict[str, Any], name: str) -> object:
    value, interval = line.get(name), line.get("intervals", {}).get(name)
    if value is None:
        return UNKNOWN
    told = (tag("br"), f"({interval[0]:.1%} to {interval[1]:.1%})") if interval else ()
    return joined(f"{value:.2%}", *told)


def _classes(line: dict[str, Any]) -> Markup:
    """Every class of a single split, the worst first; of several none, as a class has another share in each."""
    splits = line.get("splits", [])
    found = splits[0].get("classes", []) if len(splits) == 1 else []
    known = sorted((each for each in found if each["accuracy"] is not None), key=lambda each: float(each["accuracy"]))
    if not known:
        return joined()
    bars = (
        joined(
            tag("span", each["name"]),
            tag("i", style=f"width:{100 * each['accuracy']:.1f}%"),
            tag("b", f"{each['accuracy']:.0%} of {each['videos']}"),
        )
        for each in known[:MOST_CLASSES]
    )
    more = f", the first {MOST_CLASSES} of {len(known)}" if len(known) > MOST_CLASSES else ""
    what = f"{line['protocol']}: classes, worst first{more}"
    return tag("details", tag("summary", what), tag("div", *bars, class_="bars"))


def _other(each: Published) -> list[object]:
    return [f"{each.method}, {each.network} {each.source}", each.pretrained_on, each.tested_on, each.top1]


def _table(head: Sequence[str], rows: Iterator[list[object]]) -> Markup:
    """On a phone every row is a block that names its cells."""
    body = (
        tag("tr", *(tag("td", tag("span", cell), data_name=name) for name, cell in zip(head, row, strict=True)))
        for row in rows
    )
    return tag(
        "table", tag("thead", tag("tr", *(tag("th", name) for name in head))), tag("tbody", *body), class_="rows"
    )
