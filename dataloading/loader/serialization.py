"""Read and drawn videos as plain arrays, to pass from a worker to the process that decodes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from dataloading.loader.augment import Augmentation
from dataloading.loader.shared_memory import SharedArrays
from dataloading.loader.video_source import EncodedVideo
from dataloading.sampling.mixture import Slot


def pack(videos: list[EncodedVideo], room: SharedArrays) -> list[dict[str, Any]]:
    """Put the arrays of videos into a room; returns the rest in JSON's types."""
    stills = [still for video in videos for still in (*video.frames, *video.flow)]
    sizes = np.array([len(still) for still in stills], dtype=np.int64)
    np.concatenate(stills, out=room.array("stills", (int(sizes.sum()),), np.uint8))
    room.put("sizes", sizes)
    for name in ("frame_of", "windows", "flow_windows"):
        room.put(name, np.stack([getattr(video, name) for video in videos]))
    return [
        {
            "turn": video.turn,
            "attempt": video.attempt,
            "sample": video.sample,
            "where": video.where,
            "label": video.label,
            "looks": [asdict(look) for look in video.looks],
            "num_stills": (len(video.frames), len(video.flow)),
        }
        for video in videos
    ]


def unpack(rest: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> list[EncodedVideo]:
    """The videos again; their arrays are views of those given."""
    stills = iter(np.split(arrays["stills"], np.cumsum(arrays["sizes"])[:-1]))
    return [
        EncodedVideo(
            turn=Slot(*one["turn"]),
            attempt=one["attempt"],
            sample=one["sample"],
            where=one["where"],
            label=one["label"],
            looks=tuple(_look(look) for look in one["looks"]),
            frames=[next(stills) for _ in range(one["num_stills"][0])],
            flow=[next(stills) for _ in range(one["num_stills"][1])],
            **{name: arrays[name][number] for name in ("frame_of", "windows", "flow_windows")},
        )
        for number, one in enumerate(rest)
    ]


def _look(fields: dict[str, Any]) -> Augmentation:
    return Augmentation(**{**fields, "jitter": tuple((name, value) for name, value in fields["jitter"])})
