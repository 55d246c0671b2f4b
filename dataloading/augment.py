"""What is done to a clip's pixels after its crop: one draw per view, the same for all its frames.

Colour jitter in random order, grey, Gaussian blur, mirror (METHOD.md, section 2). Drawing needs no pixels
and comes before decoding; applying runs in torch, where the batch is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from mcl_dist.config import number
from mcl_dist.errors import ConfigError

# ITU-R 601 shares of red, green and blue in grey.
_GREY = (0.299, 0.587, 0.114)
_CHUNK_PIXELS = 2**18


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
    """A view's pixels, uint8 (T, H, W, 3) RGB, after one draw; same shape, type and device."""
    if drawn.jitter or drawn.grey or drawn.blur_sigma:
        parts = torch.split(clip_thwc, _chunk(clip_thwc))
        clip_thwc = torch.cat([_recolour(frames_thwc, drawn) for frames_thwc in parts])
    return clip_thwc.flip(-2) if drawn.mirror else clip_thwc


def blur_radius(sigma: float) -> int:
    """Pixels to either side that a blur reaches; a view must be larger."""
    return math.ceil(3 * sigma)


def mirror_flow(flow: torch.Tensor) -> torch.Tensor:
    """Flow bytes, uint8 (..., H, W, 2) horizontal then vertical, of the mirrored video: what lies left moves
    right, so the horizontal byte becomes 255 minus itself.
    """
    horizontal, vertical = flow.flip(-2).unbind(-1)
    return torch.stack((255 - horizontal, vertical), dim=-1)


def _chunk(clip_thwc: torch.Tensor) -> int:
    """Frames to work on at a time: on a CPU so few that temporaries stay in the cache and on the heap."""
    num_frames, height, width, _ = clip_thwc.shape
    return num_frames if clip_thwc.is_cuda else max(1, _CHUNK_PIXELS // (height * width))


def _recolour(frames_thwc: torch.Tensor, drawn: Augmentation) -> torch.Tensor:
    planes = torch.stack(frames_thwc.unbind(-1)).float()
    for name, value in drawn.jitter:
        _JITTER[name](planes, value)
    if drawn.grey:
        planes = _grey(planes)[None]
    if drawn.blur_sigma:
        planes = _blur(planes, drawn.blur_sigma)
    planes = planes.add_(0.5).to(torch.uint8)
    return torch.stack(planes.expand(3, -1, -1, -1).unbind(0), dim=-1)


def _brightness(planes_cthw: torch.Tensor, factor: float) -> None:
    planes_cthw.mul_(factor).clamp_(0, 255)


def _contrast(planes_cthw: torch.Tensor, factor: float) -> None:
    """Blend with each frame's mean grey."""
    # Rows first, then their means: the same sum for any number of threads.
    red, green, blue = planes_cthw.mean(dim=3).mean(dim=2)
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
    # Masks of 0 and 1 and interpolations between instead of torch.where, which is ten times slower here.
    red_leads = torch.ge(red, value, out=torch.empty_like(value))
    green_leads = torch.ge(green, value, out=torch.empty_like(value))
    sixths = (red - green).mul_(per_chroma).add_(4)
    sixths.lerp_((blue - red).mul_(per_chroma).add_(2), green_leads)
    sixths.lerp_((green - blue).mul_(per_chroma), red_leads).add_(6 * turn)
    sixths.sub_((sixths / 6).floor_(), alpha=6)
    # A channel is full within a sixth of its own hue, absent from two sixths on, and linear between.
    torch.sub(sixths, 3, out=red).abs_().sub_(1)
    torch.sub(sixths, 2, out=green).abs_().neg_().add_(2)
    torch.sub(sixths, 4, out=blue).abs_().neg_().add_(2)
    planes_cthw.clamp_(0, 1).mul_(chroma).add_(low)


_JITTER = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}


def _blur(planes_cthw: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur, edges reflected: one pass per axis of shifted sums, which on a CPU is several times
    faster than a convolution with a single channel.
    """
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
