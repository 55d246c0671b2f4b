"""Image of the four tubelets of one video, with their crops and motion maps."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dataloading.loader.config import DataConfig
from dataloading.reading.shard_set import ShardSet, StoredVideo
from dataloading.sampling.epoch_order import sample_generator
from dataloading.sampling.tubelets import Tubelet, draw_tubelets
from dataloading.visualize import VIEWS, decode_frames, decode_windows

NUM_SHOWN = 5  # frames of each clip
CROP_COLOUR = "#00d8ff"


def save_tubelet_picture(path: Path, shard_set: ShardSet, position: int, config: DataConfig, *, seed: int) -> None:
    """Write a PNG of the tubelets of a video in the first epoch of a run with this seed.

    Each view is a row: frames of its clip with their motion maps and the crop box, and one cropped frame at the right.
    """
    video = shard_set.read(position)
    cut = config.cut(shard_set.stored_stride(config.stride))
    order, tubelets = draw_tubelets(
        sample_generator(seed, 0, position),
        cut,
        frame_maps=video.frame_maps,
        clip_scores=video.clip_scores,
        height=video.height,
        width=video.width,
    )
    figure = Figure(figsize=(2 * (NUM_SHOWN + 1), 2.15 * len(VIEWS)), layout="constrained")
    half = "first" if order else "second"
    name = shard_set.manifest.classes[int(shard_set.labels[position])]
    figure.suptitle(f"a video of class {name}: the first clip is from the {half} half of its {video.num_frames} frames")
    rows = figure.subplots(len(VIEWS), NUM_SHOWN + 1)
    for axes, view, tubelet in zip(rows, VIEWS, tubelets, strict=True):
        _draw_view(axes, view, video, tubelet, config.crop)
    figure.savefig(path, dpi=100)


def _draw_view(axes: np.ndarray, view: str, video: StoredVideo, tubelet: Tubelet, crop: int) -> None:
    shown = tubelet.frames[np.linspace(0, len(tubelet.frames) - 1, NUM_SHOWN).round().astype(int)]
    images = decode_frames(video, shown.tolist())
    maximum = max(int(video.frame_maps[tubelet.frames].max()), 1)
    for axis, frame, image in zip(axes, shown, images, strict=False):
        axis.imshow(image)
        axis.imshow(
            video.frame_maps[frame],
            extent=(-0.5, video.width - 0.5, video.height - 0.5, -0.5),
            cmap="inferno",
            vmin=0,
            vmax=maximum,
            alpha=0.45,
        )
        top, left, height, width = tubelet.box
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=CROP_COLOUR, lw=2))
        _label(axis, f"frame {frame}")
    (crop_image,) = decode_windows(video.frames(shown[:1]), np.array([tubelet.box]), (crop, crop))
    axes[-1].imshow(crop_image)
    _label(axes[-1], "crop")
    axes[0].set_ylabel(view)


def _label(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
