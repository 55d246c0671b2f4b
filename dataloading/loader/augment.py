"""What is done to a clip's pixels after its crop: one draw per view, the same for all its frames.

Colour jitter in random order, grey, Gaussian blur, mirror (METHOD.md, section 2). Drawing needs no pixels
and comes before decoding; applying runs where the batch is, in OpenCV on a CPU and in torch on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from mcl_dist.config import number
from mcl_dist.errors import ConfigError

# ITU-R 601 shares of red, green and blue in grey.
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentConfig:
    """How views differ from their video: ranges of crops, strengths and probabilities.

    `area` is a crop's share of the frame, `aspect` its width over height, `blur_sigma` in pixels of the
    view. A strength s draws a factor from [1-s, 1+s]; hue's is a share of the colour circle, [-s, s].
    """

    area: tuple[float, float] = (0.2, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    jitter_probability: float = number(0.8, minimum=0, maximum=1)
    brightness: float = number(0.4, minimum=0, maximum=1)
    contrast: float = number(0.4, minimum=0, maximum=1)
    saturation: float = number(0.4, minimum=0, maximum=1)
    hue: float = number(0.1, minimum=0, maximum=0.5)
    grey_probability: float = number(0.2, minimum=0, maximum=1)
    blur_probability: float = number(0.5, minimum=0, maximum=1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    mirror_probability: float = number(0.5, minimum=0, maximum=1)

    def __post_init__(self) -> None:
        for name, (low, high) in (
            ("area", self.area),
            ("aspect", self.aspect),
            ("blur_sigma", self.blur_sigma),
        ):
            if not 0 < low <= high or (name == "area" and high > 1):
                allowed = "a share of the frame, at most 1" if name == "area" else "above 0"
                raise ConfigError(
                    f"augment.{name}: found [{low}, {high}], must be the lowest and the highest value, {allowed}"
                )


@dataclass(frozen=True)
class Augmentation:
    """One view's draw: (operation, value) of the colour jitter in order, none when not drawn; whether it
    turns grey; the blur's sigma in pixels, 0 for none; whether it is mirrored.
    """

    jitter: tuple[tuple[str, float], ...]
    grey: bool
    blur_sigma: float
    mirror: bool


def draw_augmentation(rng: np.random.Generator, config: AugmentConfig) -> Augmentation:
    """One view's draw; takes the same numbers from `rng` whatever it decides."""
    factors = {
        name: float(rng.uniform(1 - strength, 1 + strength))
        for name, strength in (
            ("brightness", config.brightness),
            ("contrast", config.contrast),
            ("saturation", config.saturation),
        )
    }
    factors["hue"] = float(rng.uniform(-config.hue, config.hue))
    order = rng.permutation(list(factors))
    sigma = float(rng.uniform(*config.blur_sigma))
    jitter, grey, blur, mirror = rng.random(4) < (
        config.jitter_probability,
        config.grey_probability,
        config.blur_probability,
        config.mirror_probability,
    )
    return Augmentation(
        jitter=tuple((str(name), factors[name]) for name in order) if jitter else (),
        grey=bool(grey),
        blur_sigma=sigma if blur else 0.0,
        mirror=bool(mirror),
    )


def augment(clip_thwc: torch.Tensor, drawn: Augmentation) -> torch.Tensor:
    """Change a view's pixels, uint8 (T, H, W, 3) RGB, by one draw, in place; returns them.

    Colours are computed in floats and rounded to bytes once, before the blur.
    """
    on_device = augment_by_torch if clip_thwc.is_cuda else augment_by_opencv
    on_device(clip_thwc, drawn)
    return clip_thwc


def augment_by_opencv(clip_thwc: torch.Tensor, drawn: Augmentation) -> None:
    """`augment` for CPUs: a frame at a time, which stays in the cache."""
    kernel = cv2.getGaussianKernel(2 * blur_radius(drawn.blur_sigma) + 1, drawn.blur_sigma)
    spare_hwc = np.empty((2, *clip_thwc.shape[1:]), dtype=np.float32)
    for frame_hwc in clip_thwc.numpy():
        if drawn.jitter or drawn.grey:
            _recolour_frame(frame_hwc, drawn, *spare_hwc)
        if drawn.blur_sigma:
            edge = cv2.BORDER_REFLECT_101
            frame_hwc[:] = cv2.sepFilter2D(frame_hwc, cv2.CV_8U, kernel, kernel, borderType=edge)
        if drawn.mirror:
            frame_hwc[:] = cv2.flip(frame_hwc, 1)


def _recolour_frame(frame_hwc: np.ndarray, drawn: Augmentation, now: np.ndarray, spare: np.ndarray) -> None:
    """Colour jitter and grey of one frame; `now` and `spare` are room for its pixels as floats."""
    np.copyto(now, frame_hwc)
    for name, value in drawn.jitter:
        if name == "brightness":
            np.multiply(now, np.float32(value), out=now)
        elif name == "contrast":
            mean = np.dot(cv2.mean(now)[:3], _GREY)
            np.multiply(now, np.float32(value), out=now)
            np.add(now, np.float32((1 - value) * mean), out=now)
        elif name == "saturation":
            cv2.transform(now, value * np.eye(3) + (1 - value) * np.array(_GREY), dst=spare)
            now, spare = spare, now
        else:
            cv2.cvtColor(now, cv2.COLOR_RGB2HSV, dst=spare)
            spare[..., 0] += np.float32(360 * (value % 1))
            cv2.cvtColor(spare, cv2.COLOR_HSV2RGB, dst=now)
        if value > 1:  # factors up to 1, and a turned hue, stay inside
            np.clip(now, 0, 255, out=now)
    if drawn.grey:
        cv2.transform(now, np.tile(_GREY, (3, 1)), dst=spare)
        now = spare
    cv2.convertScaleAbs(now, dst=frame_hwc)


def augment_by_torch(clip_thwc: torch.Tensor, drawn: Augmentation) -> None:
    """`augment` wherever torch computes."""
    if drawn.jitter or drawn.grey or drawn.blur_sigma:
        planes = torch.stack(clip_thwc.unbind(-1)).float()
        for name, value in drawn.jitter:
            _JITTER[name](planes, value)
        if drawn.grey:
            planes = _grey(planes)[None]
        if drawn.blur_sigma:
            planes = _blur(planes.round_(), drawn.blur_sigma)
        planes = planes.round_().to(torch.uint8)
        clip_thwc.copy_(torch.stack(planes.expand(3, -1, -1, -1).unbind(0), dim=-1))
    if drawn.mirror:
        clip_thwc.copy_(clip_thwc.flip(-2))


def blur_radius(sigma: float) -> int:
    """Pixels to either side that a blur reaches; a view must be larger."""
    return math.ceil(3 * sigma)


def _brightness(planes_cthw: torch.Tensor, factor: float) -> None:
    planes_cthw.mul_(factor).clamp_(0, 255)


def _contrast(planes_cthw: torch.Tensor, factor: float) -> None:
    """Blend with each frame's mean grey."""
    red, green, blue = planes_cthw.mean(dim=(2, 3))
    mean = _GREY[0] * red + _GREY[1] * green + _GREY[2] * blue
    planes_cthw.mul_(factor).add_((mean * (1 - factor))[:, None, None]).clamp_(0, 255)


def _saturation(planes_cthw: torch.Tensor, factor: float) -> None:
    """Blend with the frame's grey."""
    grey = _grey(planes_cthw).mul_(1 - factor)
    planes_cthw.mul_(factor).add_(grey).clamp_(0, 255)


def _grey(planes_cthw: torch.Tensor) -> torch.Tensor:
    red, green, blue = planes_cthw
    grey: torch.Tensor = red * _GREY[0]
    return grey.add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def _hue(planes_cthw: torch.Tensor, turn: float) -> None:
    """Turn the hue of HSV by a share of the circle; value and saturation stay."""
    red, green, blue = planes_cthw
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    # A grey pixel has no hue: its differences are 0, whatever they are divided by.
    per_chroma = chroma.clamp_min(1e-6).reciprocal_()
    sixths = (red - green).mul_(per_chroma).add_(4)
    sixths = torch.where(green >= value, (blue - red).mul_(per_chroma).add_(2), sixths)
    sixths = torch.where(red >= value, (green - blue).mul_(per_chroma), sixths).add_(6 * turn)
    sixths.sub_((sixths / 6).floor_(), alpha=6)
    # A channel is full within a sixth of its own hue, absent from two sixths on, and linear between.
    torch.sub(sixths, 3, out=red).abs_().sub_(1)
    torch.sub(sixths, 2, out=green).abs_().neg_().add_(2)
    torch.sub(sixths, 4, out=blue).abs_().neg_().add_(2)
    planes_cthw.clamp_(0, 1).mul_(chroma).add_(low)


_JITTER = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}


def _blur(planes_cthw: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur, edges reflected: one pass per axis of shifted sums."""
    radius = blur_radius(sigma)
    offsets = range(-radius, radius + 1)
    weights = [math.exp(-((offset / sigma) ** 2) / 2) for offset in offsets]
    total = sum(weights)
    padded = F.pad(planes_cthw, (radius,) * 4, mode="reflect")
    for axis in (2, 3):
        size = planes_cthw.shape[axis]
        taps = [padded.narrow(axis, shift, size) for shift in range(len(weights))]
        blurred = taps[radius] * (weights[radius] / total)
        for shift, weight in enumerate(weights):
            if shift != radius:
                blurred.add_(taps[shift], alpha=weight / total)
        padded = blurred
    return padded
