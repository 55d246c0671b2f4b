"""Encoded videos as plain arrays and JSON, to pass from a worker to the process that decodes."""

from dataclasses import asdict
from typing import Any

import numpy as np

from dataloading.loader.augment import Augmentation
from dataloading.loader.shared_memory import SharedArrays
from dataloading.loader.video_source import EncodedVideo
from dataloading.sampling.mixture import Slot


def pack(videos: list[EncodedVideo], buffer: SharedArrays) -> list[dict[str, Any]]:
    """Put the arrays of videos into a buffer; returns all other fields in JSON's types."""
    stills = [still for video in videos for still in (*video.frames, *video.flow)]
    sizes = np.array([len(still) for still in stills], dtype=np.int64)
    np.concatenate(stills, out=buffer.allocate("stills", (int(sizes.sum()),), np.uint8))
    buffer.put("sizes", sizes)
    for name in ("frame_index", "windows", "flow_windows"):
        buffer.put(name, np.stack([getattr(video, name) for video in videos]))
    return [
        {
            "slot": video.slot,
            "attempt": video.attempt,
            "sample": video.sample,
            "where": video.where,
            "label": video.label,
            "augmentations": [asdict(drawn) for drawn in video.augmentations],
            "num_stills": (len(video.frames), len(video.flow)),
        }
        for video in videos
    ]


def unpack(fields: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> list[EncodedVideo]:
    """The videos of `pack`; their arrays are views of the given ones."""
    stills = iter(np.split(arrays["stills"], np.cumsum(arrays["sizes"])[:-1]))
    return [
        EncodedVideo(
            slot=Slot(*video["slot"]),
            attempt=video["attempt"],
            sample=video["sample"],
            where=video["where"],
            label=video["label"],
            augmentations=tuple(_augmentation(drawn) for drawn in video["augmentations"]),
            frames=[next(stills) for _ in range(video["num_stills"][0])],
            flow=[next(stills) for _ in range(video["num_stills"][1])],
            **{name: arrays[name][number] for name in ("frame_index", "windows", "flow_windows")},
        )
        for number, video in enumerate(fields)
    ]


def _augmentation(fields: dict[str, Any]) -> Augmentation:
    return Augmentation(**{**fields, "jitter": tuple((name, value) for name, value in fields["jitter"])})
