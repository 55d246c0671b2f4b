"""Section "Evaluations" of a run's report: its own results beside published ones."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from launch.evaluation.results_log import ONLINE
from launch.report.html import SafeHtml, bars, fragment, tag
from launch.terminal.units import UNKNOWN
from mcl_dist.storage.store_requests import without_credentials

MAX_CLASSES = 60
PROTOCOL_NAMES = {ONLINE: "online kNN"}
STYLE = """
.rows{border-collapse:collapse;width:100%}.rows th,.rows td{text-align:left;vertical-align:top}
.rows td{overflow-wrap:anywhere}
@media(max-width:36rem){.rows thead{display:none}
.rows tr{display:block;padding:.5rem 0;border-bottom:1px solid var(--line)}
.rows td{display:flex;gap:.8rem;border:0;padding:.1rem 0}.rows td::before{content:attr(data-name);flex:0 0 6.5rem;
color:var(--soft);font-weight:400}}
"""


class Published(NamedTuple):
    """Published top-1 accuracy of a linear classifier on frozen features."""

    method: str
    network: str
    pretrained_on: str
    tested_on: str
    top1: str
    source: str


MCL, CVRL, STUDY = "[1]", "[2]", "[3]"
SOURCES = (
    f"{MCL} Li et al., ICCV 2021 (arXiv 2201.04029), abstract; it reports ImageNet's supervised encoder 6.78 below MCL "
    "on UCF101",
    f"{CVRL} Qian et al., CVPR 2021 (arXiv 2008.03800), checkpoints in the authors' repository tensorflow/models",
    f"{STUDY} Feichtenhofer et al., CVPR 2021 (arXiv 2104.14558), table in the authors' repository "
    "facebookresearch/SlowFast",
)
PUBLISHED = (
    Published("MCL", "R(2+1)D-50", "not stated in the abstract", "UCF101", "81.91 %", MCL),
    Published("ImageNet, supervised", "network not stated", "ImageNet labels", "UCF101", "75.13 %", MCL),
    Published("MCL", "R(2+1)D-50", "not stated in the abstract", "Kinetics-400", "66.62 %", MCL),
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
    "Accuracies are comparable only on the same test set with the same protocol. Results of this run refer to the sets "
    "named in the table; the name of a set or folder does not prove that it is UCF101 or Kinetics-400.",
    "The published networks, pre-training lengths, clips (8 frames at stride 8, 16 at stride 4, and so on) and numbers "
    "of test clips and crops differ from one another and from this run.",
    "MCL starts from MoCo-v2's ImageNet weights, CVRL from random weights.",
    "MCL's Kinetics-400 result is a linear layer on clips of 32 frames; its UCF101 result is a linear classifier on "
    "features, the protocol of `mcl evaluate svm`.",
    "kNN and retrieval measure something else than a linear classifier; the paper has no results for them.",
    "Confidence intervals cover the choice of test videos only (bootstrap); other pre-training seeds may vary more.",
)


def evaluations_section(results: Sequence[dict[str, Any]]) -> SafeHtml:
    """The newest result of each evaluation of this run, and published results."""
    own = _newest(results)
    if own:
        head = ("protocol", "set", "top-1", "top-5", "mean class", "videos", "checkpoint")
        rows = (_own_row(result, _differing_settings(result, own)) for result in own)
        content = fragment(_table(head, rows), *(_classes(result) for result in own))
    else:
        reason = "This run has not been evaluated; run `mcl evaluate svm --checkpoint RUN --train URL --test URL`."
        content = tag("p", reason, class_="absent")
    return fragment(
        tag("h3", "This run"),
        content,
        tag("h3", "Published: linear classifiers on frozen features"),
        _table(("method", "trained on", "tested on", "top-1"), map(_published_row, PUBLISHED)),
        tag("p", *(fragment(source, tag("br")) for source in SOURCES), class_="soft"),
        tag("ul", *(tag("li", caveat) for caveat in CAVEATS), class_="soft"),
    )


def _newest(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last result for each protocol, settings, sets and step; a single one for online kNN. Newest first."""
    by_kind: dict[str, dict[str, Any]] = {}
    for result in results:
        protocol = result["protocol"]
        sets = [(split.get("train"), split.get("test")) for split in result.get("splits", [])]
        kind = ONLINE if protocol == ONLINE else repr((protocol, result.get("settings"), sets, result.get("step")))
        by_kind.pop(kind, None)
        by_kind[kind] = result
    return list(reversed(by_kind.values()))


def _differing_settings(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, object]:
    """Settings that differ among the results of a protocol, without the clips, which every row shows."""
    settings = [_flat(each.get("settings") or {}) for each in results if each["protocol"] == result["protocol"]]
    own = _flat(result.get("settings") or {})
    return {
        name: value
        for name, value in own.items()
        if not name.startswith("clips.") and any(each.get(name) != value for each in settings)
    }


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, object]:
    """Values by dotted key."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return flat


def _own_row(result: dict[str, Any], differing: dict[str, object]) -> list[object]:
    splits = result.get("splits", [])
    sets = without_credentials(", ".join(str(split.get("test")) for split in splits))
    step = result.get("step")
    return [
        f"{PROTOCOL_NAMES.get(result['protocol'], result['protocol'])}{_settings(result.get('settings'), differing)}",
        sets + (f" (mean of {len(splits)} splits)" if len(splits) > 1 else ""),
        *(_score(result, name) for name in ("top1", "top5", "mean_class")),
        f"{result['videos']:,}" if "videos" in result else UNKNOWN,
        "of this run" if step is None else f"step {step:,}",
    ]


def _settings(settings: dict[str, Any] | None, differing: dict[str, object]) -> str:
    clips = (settings or {}).get("clips", {})
    parts = [f"{clips[name]} {name}" for name in ("frames", "stride", "crop") if clips.get(name)]
    if "count" in clips:
        parts.insert(0, f"{clips['count']} clips × {clips['crops']} crops")
    parts += [f"{name} {value}" for name, value in differing.items()]
    return f": {', '.join(parts)}" if parts else ""


def _score(result: dict[str, Any], name: str) -> object:
    value, interval = result.get(name), result.get("intervals", {}).get(name)
    if value is None:
        return UNKNOWN
    suffix = (tag("br"), f"({interval[0]:.1%} to {interval[1]:.1%})") if interval else ()
    return fragment(f"{value:.2%}", *suffix)


def _classes(result: dict[str, Any]) -> SafeHtml:
    """Accuracy by class, worst first, of a single split; nothing for several splits, whose class sizes differ."""
    splits = result.get("splits", [])
    classes = splits[0].get("classes", []) if len(splits) == 1 else []
    known = sorted((each for each in classes if each["accuracy"] is not None), key=lambda each: float(each["accuracy"]))
    if not known:
        return fragment()
    rows = (
        (each["name"], 100 * each["accuracy"], f"{each['accuracy']:.0%} of {each['videos']}")
        for each in known[:MAX_CLASSES]
    )
    more = f", the first {MAX_CLASSES} of {len(known)}" if len(known) > MAX_CLASSES else ""
    title = f"{result['protocol']}: classes, worst first{more}"
    return tag("details", tag("summary", title), bars(rows))


def _published_row(published: Published) -> list[object]:
    name = f"{published.method}, {published.network} {published.source}"
    return [name, published.pretrained_on, published.tested_on, published.top1]


def _table(head: Sequence[str], rows: Iterable[list[object]]) -> SafeHtml:
    """A table whose rows become blocks of named cells on a phone."""
    body = (
        tag("tr", *(tag("td", tag("span", cell), data_name=name) for name, cell in zip(head, row, strict=True)))
        for row in rows
    )
    names = tag("tr", *(tag("th", name) for name in head))
    return tag("table", tag("thead", names), tag("tbody", *body), class_="rows")
