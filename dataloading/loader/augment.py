"""Augmentation of a clip's pixels after its crop: one draw per view, the same for all its frames.

Colour jitter in random order, grey, Gaussian blur, mirror (METHOD.md, section 2). Drawing needs no pixels and comes
before decoding; applying runs on the batch's device, in OpenCV on a CPU and in torch on a GPU.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from mcl_dist.config import number
from mcl_dist.errors import ConfigError

# ITU-R 601 weights of red, green and blue in grey.
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentConfig:
    """Ranges of crops, and strengths and probabilities of the augmentation.

    `area` is a crop's share of the frame, `aspect` its width over height, `blur_sigma` in pixels of the view. A
    strength s draws a factor from [1-s, 1+s]; a hue strength draws a share of the colour circle from [-s, s].
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
        for name, (low, high) in (("area", self.area), ("aspect", self.aspect), ("blur_sigma", self.blur_sigma)):
            if not 0 < low <= high or (name == "area" and high > 1):
                allowed = "a share of the frame, at most 1" if name == "area" else "above 0"
                raise ConfigError(
                    f"augment.{name}: found [{low}, {high}], must be the lowest and the highest value, {allowed}"
                )


@dataclass(frozen=True)
class Augmentation:
    """One view's draw.

    Attributes:
        jitter: operations of the colour jitter in order, with their values; empty: none.
        grey: the view is grey.
        blur_sigma: in pixels; 0: no blur.
        mirror: the view is mirrored.
    """

    jitter: tuple[tuple[str, float], ...]
    grey: bool
    blur_sigma: float
    mirror: bool


def draw_augmentation(rng: np.random.Generator, config: AugmentConfig) -> Augmentation:
    """Draw one view's augmentation; takes the same count of numbers from `rng` for every outcome."""
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
    """Augment a view, uint8 (T, H, W, 3) RGB, in place; returns it.

    Colours are computed in floats and rounded to bytes once, before the blur.
    """
    apply = augment_by_torch if clip_thwc.is_cuda else augment_by_opencv
    apply(clip_thwc, drawn)
    return clip_thwc


def augment_by_opencv(clip_thwc: torch.Tensor, drawn: Augmentation) -> None:
    """`augment` for CPUs: one frame at a time, so that it stays in the cache."""
    kernel = cv2.getGaussianKernel(2 * blur_radius(drawn.blur_sigma) + 1, drawn.blur_sigma)
    buffers_hwc = np.empty((2, *clip_thwc.shape[1:]), dtype=np.float32)
    for frame_hwc in clip_thwc.numpy():
        if drawn.jitter or drawn.grey:
            _recolour_frame(frame_hwc, drawn, *buffers_hwc)
        if drawn.blur_sigma:
            edge = cv2.BORDER_REFLECT_101
            frame_hwc[:] = cv2.sepFilter2D(frame_hwc, cv2.CV_8U, kernel, kernel, borderType=edge)
        if drawn.mirror:
            frame_hwc[:] = cv2.flip(frame_hwc, 1)


def _recolour_frame(frame_hwc: np.ndarray, drawn: Augmentation, current: np.ndarray, spare: np.ndarray) -> None:
    """Colour jitter and grey of one frame; `current` and `spare` are float buffers for its pixels."""
    np.copyto(current, frame_hwc)
    for name, value in drawn.jitter:
        if name == "brightness":
            np.multiply(current, np.float32(value), out=current)
        elif name == "contrast":
            mean = np.dot(cv2.mean(current)[:3], _GREY)
            np.multiply(current, np.float32(value), out=current)
            np.add(current, np.float32((1 - value) * mean), out=current)
        elif name == "saturation":
            cv2.transform(current, value * np.eye(3) + (1 - value) * np.array(_GREY), dst=spare)
            current, spare = spare, current
        else:
            cv2.cvtColor(current, cv2.COLOR_RGB2HSV, dst=spare)
            spare[..., 0] += np.float32(360 * (value % 1))
            cv2.cvtColor(spare, cv2.COLOR_HSV2RGB, dst=current)
        if value > 1:  # factors up to 1, and hue shifts, stay in range
            np.clip(current, 0, 255, out=current)
    if drawn.grey:
        cv2.transform(current, np.tile(_GREY, (3, 1)), dst=spare)
        current = spare
    cv2.convertScaleAbs(current, dst=frame_hwc)


def augment_by_torch(clip_thwc: torch.Tensor, drawn: Augmentation) -> None:
    """`augment` in torch, on any device."""
    if drawn.jitter or drawn.grey or drawn.blur_sigma:
        channels = torch.stack(clip_thwc.unbind(-1)).float()
        for name, value in drawn.jitter:
            _JITTER[name](channels, value)
        if drawn.grey:
            channels = _grey(channels)[None]
        if drawn.blur_sigma:
            channels = _blur(channels.round_(), drawn.blur_sigma)
        channels = channels.round_().to(torch.uint8)
        clip_thwc.copy_(torch.stack(channels.expand(3, -1, -1, -1).unbind(0), dim=-1))
    if drawn.mirror:
        clip_thwc.copy_(clip_thwc.flip(-2))


def blur_radius(sigma: float) -> int:
    """Radius of a blur's kernel in pixels; a view must be larger."""
    return math.ceil(3 * sigma)


def _brightness(channels_cthw: torch.Tensor, factor: float) -> None:
    channels_cthw.mul_(factor).clamp_(0, 255)


def _contrast(channels_cthw: torch.Tensor, factor: float) -> None:
    """Blend with each frame's mean grey."""
    red, green, blue = channels_cthw.mean(dim=(2, 3))
    mean = _GREY[0] * red + _GREY[1] * green + _GREY[2] * blue
    channels_cthw.mul_(factor).add_((mean * (1 - factor))[:, None, None]).clamp_(0, 255)


def _saturation(channels_cthw: torch.Tensor, factor: float) -> None:
    """Blend with the frame's grey."""
    grey = _grey(channels_cthw).mul_(1 - factor)
    channels_cthw.mul_(factor).add_(grey).clamp_(0, 255)


def _grey(channels_cthw: torch.Tensor) -> torch.Tensor:
    red, green, blue = channels_cthw
    grey: torch.Tensor = red * _GREY[0]
    return grey.add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def _hue(channels_cthw: torch.Tensor, shift: float) -> None:
    """Shift the hue of HSV by a share of the circle; value and saturation stay."""
    red, green, blue = channels_cthw
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    # A grey pixel has no hue: its differences are 0, divided by any number.
    per_chroma = chroma.clamp_min(1e-6).reciprocal_()
    sixths = (red - green).mul_(per_chroma).add_(4)
    sixths = torch.where(green >= value, (blue - red).mul_(per_chroma).add_(2), sixths)
    sixths = torch.where(red >= value, (green - blue).mul_(per_chroma), sixths).add_(6 * shift)
    sixths.sub_((sixths / 6).floor_(), alpha=6)
    # A channel is 1 within a sixth of its own hue, 0 from two sixths on, and linear in between.
    torch.sub(sixths, 3, out=red).abs_().sub_(1)
    torch.sub(sixths, 2, out=green).abs_().neg_().add_(2)
    torch.sub(sixths, 4, out=blue).abs_().neg_().add_(2)
    channels_cthw.clamp_(0, 1).mul_(chroma).add_(low)


_JITTER = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}


def _blur(channels_cthw: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur with reflected edges: one pass of shifted sums per axis."""
    radius = blur_radius(sigma)
    offsets = range(-radius, radius + 1)
    weights = [math.exp(-((offset / sigma) ** 2) / 2) for offset in offsets]
    total = sum(weights)
    padded = F.pad(channels_cthw, (radius,) * 4, mode="reflect")
    for axis in (2, 3):
        size = channels_cthw.shape[axis]
        taps = [padded.narrow(axis, shift, size) for shift in range(len(weights))]
        blurred = taps[radius] * (weights[radius] / total)
        for shift, weight in enumerate(weights):
            if shift != radius:
                blurred.add_(taps[shift], alpha=weight / total)
        padded = blurred
    return padded
