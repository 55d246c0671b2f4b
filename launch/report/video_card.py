"""One video on the page of `mcl shards inspect`: facts, sampled frames, clip scores and tubelets."""

from collections.abc import Iterable

import cv2
import numpy as np

from dataloading.flow.colours import colour_wheel
from dataloading.sampling.tubelets import CLIP_OF_VIEW, NUM_CLIPS
from dataloading.visualize import TubeletImages, VideoInspection
from launch.report.html import SafeHtml, fragment, jpeg_uri, png_uri, tag
from launch.terminal.units import UNKNOWN

CURVE_WIDTH, CURVE_HEIGHT, CURVE_MARGIN = 400, 120, 16
CURVE_BOTTOM = CURVE_HEIGHT - CURVE_MARGIN
MARK_RADIUS = 6
WHEEL_SIZE = 96


def definition_list(rows: Iterable[tuple[str, object]], width: str = "narrow") -> SafeHtml:
    """A list of names and values; a `wide` one has two columns on wide screens."""
    pairs = (fragment(tag("dt", name.replace("_", " ")), tag("dd", value)) for name, value in rows)
    return tag("dl", *pairs, class_=width)


def video_card(video: VideoInspection) -> SafeHtml:
    """The card of one video."""
    return tag(
        "section",
        tag("h2", video.class_name),
        definition_list(_video_facts(video), "wide"),
        tag("h3", "Frames, flow and motion"),
        _legends(video),
        tag("div", *(_frame_figure(video, index) for index in range(len(video.frame_images))), class_="moments"),
        tag("h3", "Clip scores and starts"),
        _curve(video),
        _curve_caption(video),
        tag("h3", "Tubelets"),
        tubelet_views(video),
        class_="card",
        id=f"video-{video.position}",
    )


def _video_facts(video: VideoInspection) -> list[tuple[str, object]]:
    info = video.info
    num_frames, fps, keep_every = len(video.frame_maps), info.get("fps"), info.get("keep_every", 1)
    length = f"{num_frames} frames"
    if isinstance(fps, int | float) and fps > 0:
        length += f" at {fps:.4g} frames/s, {num_frames / fps:.1f} s"
    half = ("second", "first")[video.order]
    return [
        ("source", info.get("source", UNKNOWN)),
        ("class", f"{video.class_name}, label {video.label}"),
        ("size", f"{video.width}×{video.height}"),
        ("length", length),
        ("stored", "every frame" if keep_every == 1 else f"one frame in {keep_every}"),
        ("flow", f"{info.get('flow', UNKNOWN)}, {video.flow_width}×{video.flow_height}"),
        ("draw", f"clips of {video.window} frames; the first from the {half} half"),
        ("key", f"{video.key}, number {video.position} of the set"),
    ]


def legend_style() -> str:
    """CSS of the legends: the colour images appear once per page."""
    scale = heat_colours(np.arange(256, dtype=np.uint8)[None])
    return (
        f".wheel{{background-image:url({png_uri(colour_wheel(WHEEL_SIZE))})}}"
        f".heat{{background-image:url({png_uri(scale)})}}"
    )


def tubelet_views(video: VideoInspection) -> SafeHtml:
    """The four views of a draw: frames with frame map and crop box, and the cropped frames."""
    return tag("div", *(_view(video, view) for view in video.views), class_="grid")


def _legends(video: VideoInspection) -> SafeHtml:
    wheel = tag("i", class_="wheel", role="img", aria_label="colour wheel of flow")
    heat = tag("i", class_="heat", role="img", aria_label="colours of the frame maps")
    return tag(
        "p",
        tag("span", wheel, f"flow; rim: {video.max_speed:.1f} pixels per frame or more"),
        tag("span", heat, f"motion boundary, 0 to {_maximum(video)}"),
        class_="legend soft",
    )


def _frame_figure(video: VideoInspection, index: int) -> SafeHtml:
    images = video.frame_images[index]
    height, width = images.image.shape[:2]
    name = f"picture-{video.position}-{index}"
    sides = {"width": width, "height": height}
    frame = tag("image", id=name, href=jpeg_uri(images.image), **sides)
    # The page holds the image once; the frame map overlays a reference to it.
    reference = tag("use", href=f"#{name}")
    label = f"frame {images.frame}"
    return tag(
        "figure",
        svg_image(width, height, frame, label=label),
        tag("img", src=jpeg_uri(images.flow_image), alt=f"flow of {label}"),
        svg_image(
            width, height, reference, _heat(video, images.frame_map, width, height), label=f"frame map of {label}"
        ),
        tag("figcaption", label),
    )


def _view(video: VideoInspection, view: TubeletImages) -> SafeHtml:
    top, left, height, width = view.tubelet.box
    frames, crops = [], []
    for frame, frame_image, crop_image in view.frame_images:
        # Coordinates are pixels of the video; the image may be smaller.
        sides = {"width": video.width, "height": video.height}
        image = tag("image", href=jpeg_uri(frame_image), preserveAspectRatio="none", **sides)
        heat = _heat(video, video.frame_maps[frame], video.width, video.height)
        label = f"{view.name}, frame {frame}"
        frames.append(svg_image(video.width, video.height, image, heat, *_boxes(view), label=label))
        crops.append(tag("img", src=jpeg_uri(crop_image), alt=f"{label}, crop"))
    clip = view.tubelet.frames
    caption = f"{view.name}: frames {clip[0]} to {clip[-1]}, {width}×{height} pixels at {left}, {top}"
    return tag("figure", tag("div", *frames, *crops, class_="view"), tag("figcaption", caption))


def _boxes(view: TubeletImages) -> tuple[SafeHtml, SafeHtml]:
    top, left, height, width = view.tubelet.box
    region, box = view.region, tag("rect", x=left, y=top, width=width, height=height, class_="box")
    place = {"x": region.left, "y": region.top}
    size = {"width": region.right - region.left, "height": region.bottom - region.top}
    return tag("rect", **{key: f"{value:.1f}" for key, value in {**place, **size}.items()}, class_="region"), box


def _heat(video: VideoInspection, motion: np.ndarray, width: int, height: int) -> SafeHtml:
    """A frame map, uint8 (7, 7), to overlay on an image."""
    scaled = np.asarray(np.rint(motion * (255 / _maximum(video))), dtype=np.uint8)
    return heat_overlay(scaled, 90 + scaled * 0.35, width, height)


def heat_overlay(values: np.ndarray, opacities: np.ndarray, width: int, height: int) -> SafeHtml:
    """Values from 0 to 255, uint8 (H, W), as coloured cells over an image; so are the opacities."""
    cells = np.dstack([heat_colours(values), opacities.astype(np.uint8)])
    sides = {"width": width, "height": height}
    return tag("image", href=png_uri(cells), preserveAspectRatio="none", class_="pixels", **sides)


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Colours of frame maps: uint8 (H, W) to RGB, uint8 (H, W, 3)."""
    return np.asarray(cv2.cvtColor(cv2.applyColorMap(values, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB))


def _maximum(video: VideoInspection) -> int:
    return max(int(video.frame_maps.max()), 1)


def svg_image(width: int, height: int, *children: SafeHtml, label: str) -> SafeHtml:
    """An image of `width` × `height` units with a description."""
    return tag("svg", *children, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def _curve(video: VideoInspection) -> SafeHtml:
    """Clip scores by start frame, bands of candidate starts, and marks at the drawn starts."""
    scores = video.clip_scores
    last = len(scores) - 1
    xs = np.linspace(CURVE_MARGIN, CURVE_WIDTH - CURVE_MARGIN, max(len(scores), 2))[: len(scores)]
    low, high = float(scores.min()), float(scores.max())
    ys = CURVE_BOTTOM - (scores - low) / max(high - low, 1e-9) * (CURVE_BOTTOM - 2 * CURVE_MARGIN)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    right = CURVE_WIDTH - CURVE_MARGIN
    return tag(
        "svg",
        *_bands(video.candidates, xs),
        tag("line", x1=CURVE_MARGIN, x2=right, y1=CURVE_BOTTOM, y2=CURVE_BOTTOM, class_="axis"),
        tag("polyline", points=points, class_="line"),
        *(_mark(name, start, xs[start], ys[start]) for name, start in _starts(video)),
        tag("text", "0", x=CURVE_MARGIN, y=CURVE_HEIGHT - 4),
        tag("text", last, x=right, y=CURVE_HEIGHT - 4, text_anchor="end"),
        tag("text", f"highest {high:.3g}, lowest {low:.3g}", x=CURVE_MARGIN, y=10),
        viewBox=f"0 0 {CURVE_WIDTH} {CURVE_HEIGHT}",
        class_="curve",
        role="img",
        aria_label="clip scores",
    )


def _bands(candidates: np.ndarray, xs: np.ndarray) -> list[SafeHtml]:
    """One band per run of consecutive starts."""
    if not len(candidates):
        return []
    runs = np.split(candidates, np.flatnonzero(np.diff(candidates) > 1) + 1)
    half = (CURVE_WIDTH - 2 * CURVE_MARGIN) / len(xs) / 2
    return [
        tag(
            "rect",
            tag("title", f"starts {run[0]} to {run[-1]}"),
            x=f"{xs[run[0]] - half:.1f}",
            y=CURVE_MARGIN,
            width=f"{xs[run[-1]] - xs[run[0]] + 2 * half:.1f}",
            height=CURVE_BOTTOM - CURVE_MARGIN,
            class_="best",
        )
        for run in runs
    ]


def _mark(name: str, start: int, x: float, y: float) -> SafeHtml:
    return tag(
        "g",
        tag("title", f"clip {name} starts at frame {start}"),
        tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=f"{y:.1f}", y2=CURVE_BOTTOM),
        tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=MARK_RADIUS),
        tag("text", name, x=f"{x:.1f}", y=f"{y:.1f}"),
        class_="start",
        data_start=start,
    )


def _starts(video: VideoInspection) -> list[tuple[str, int]]:
    """Number and start frame of each clip."""
    views = [video.views[CLIP_OF_VIEW.index(clip)] for clip in range(NUM_CLIPS)]
    return [(str(number), int(view.tubelet.frames[0])) for number, view in enumerate(views, start=1)]


def _curve_caption(video: VideoInspection) -> SafeHtml:
    starts = ", ".join(f"{name} at frame {start}" for name, start in _starts(video))
    caption = f"Clip starts: {starts}. Clip 1 gives query and first key, clips 2 and 3 the other keys."
    if not len(video.candidates):
        caption += " The video is shorter than two windows, so its starts are drawn without using the scores."
    return tag("p", caption, class_="soft")
