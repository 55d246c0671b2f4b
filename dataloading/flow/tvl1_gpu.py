"""TV-L1 of a batch of frame pairs, in plain PyTorch, for a GPU.

The same steps as `dataloading.flow.tvl1_kernels`, on images (B, H, W). A pair that has converged is frozen while the
others continue, so a pair's flow does not depend on its batch.
"""

import shutil
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  its customary name

from dataloading.flow.tvl1_config import FLAT, MEDIAN_EVERY, SMALLEST_SIDE, TVL1Config

CHECK_EVERY = 10  # steps; a check for convergence waits for the device

Sorted = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def batch_flow(earlier: torch.Tensor, later: torch.Tensor, config: TVL1Config) -> torch.Tensor:
    """Flow of every pair; arguments and result as in `dataloading.flow.tvl1.tvl1_flow`."""
    with torch.inference_mode():
        pyramids = [_pyramid(frames.float(), config) for frames in (earlier, later)]
        flow = torch.zeros(2, *pyramids[0][-1].shape, device=earlier.device)
        for frame, target in reversed(list(zip(*pyramids, strict=True))):
            height, width = frame.shape[-2:]
            if flow.shape[-2:] != frame.shape[-2:]:
                old_height, old_width = flow.shape[-2:]
                flow = _resize(flow, (height, width), (old_height / height, old_width / width)) / config.scale_step
            flow = _solve(frame, target, flow, config)
        return flow.transpose(0, 1).contiguous()


def _solve(earlier: torch.Tensor, later: torch.Tensor, flow: torch.Tensor, config: TVL1Config) -> torch.Tensor:
    """Iterate the flow (2, B, H, W) of one scale until it converges."""
    median, step = _compiled(_median, flow.device.type), _compiled(_step, flow.device.type)
    sources = torch.stack((later, *_gradients(later)), dim=1)
    dual = torch.zeros(2, *flow.shape, device=flow.device)
    for max_steps in config.max_steps:
        data = _linearise(earlier, sources, flow, config)
        active = torch.ones(len(earlier), 1, 1, device=flow.device)
        for number in range(max_steps):
            if number % CHECK_EVERY == 0 and not active.any():
                break
            if number % MEDIAN_EVERY == 0:
                flow = torch.where(active > 0, median(flow), flow)
            flow, dual, change = step(flow, dual, data, active, config.tightness, config.time_step)
            active = active * (change > config.tolerance**2)
    return flow


def _step(
    flow: torch.Tensor, dual: torch.Tensor, data: torch.Tensor, active: torch.Tensor, tightness: float, time_step: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of the flow and its dual (direction, component, B, H, W); and the mean squares of the flow's change."""
    slope, residual, limit = data[:2], data[2], data[3]
    along = residual + slope[0] * flow[0] + slope[1] * flow[1]
    along = torch.minimum(torch.maximum(along, -limit), limit)
    across, down = dual
    divergence = across - F.pad(across, (1, 0))[..., :-1] + (down - F.pad(down, (0, 0, 1, 0))[..., :-1, :])
    change = (tightness * divergence - along * slope) * active
    flow = flow + change
    rate = time_step / tightness
    derivatives = torch.stack(
        (F.pad(flow[..., 1:] - flow[..., :-1], (0, 1)), F.pad(flow[..., 1:, :] - flow[..., :-1, :], (0, 0, 0, 1)))
    )
    length = derivatives.square().sum(dim=0).sqrt()
    updated = (dual + rate * derivatives) / (1 + rate * length)
    return flow, torch.where(active > 0, updated, dual), change.square().sum(dim=0).mean(dim=(-2, -1), keepdim=True)


def _linearise(earlier: torch.Tensor, sources: torch.Tensor, flow: torch.Tensor, config: TVL1Config) -> torch.Tensor:
    """The data term around the flow, (4, B, H, W): unit slope across and down, residual along it, limit of a step."""
    height, width = earlier.shape[-2:]
    columns = torch.arange(width, dtype=torch.float32, device=flow.device)
    rows = torch.arange(height, dtype=torch.float32, device=flow.device)[:, None]
    grid = torch.stack(((flow[0] + columns) * (2 / (width - 1)) - 1, (flow[1] + rows) * (2 / (height - 1)) - 1), dim=-1)
    warped = F.grid_sample(sources, grid, mode="bicubic", padding_mode="zeros", align_corners=True)
    frame, across, down = warped.unbind(1)
    square = across * across + down * down
    inverse = torch.where(square > FLAT, square.rsqrt(), 0.0)
    residual = (frame - across * flow[0] - down * flow[1] - earlier) * inverse
    limit = config.attachment * config.tightness * square * inverse
    return torch.stack((across * inverse, down * inverse, residual, limit))


def _median(images: torch.Tensor) -> torch.Tensor:
    """Median of the 5×5 pixels around each of (…, H, W); the algorithm of `dataloading.flow.median`."""
    height, width = images.shape[-2:]
    padded = F.pad(images.flatten(0, -3), (2, 2, 2, 2), mode="replicate").view(*images.shape[:-2], height + 4, -1)
    ranks = _sorted(*(padded[..., row : row + height, :] for row in range(5)))
    lowest, low, middle, high, highest = (
        _sorted(*(rank[..., column : column + width] for column in range(5))) for rank in ranks
    )
    before = lowest[3].maximum(low[2]).maximum(middle[1].maximum(high[0]))
    after = low[4].minimum(middle[3]).minimum(high[2].minimum(highest[1]))
    diagonal = _sorted(lowest[4], low[3], middle[2], high[1], highest[0])[2]
    return before.minimum(diagonal).maximum(before.maximum(diagonal).minimum(after))


def _sorted(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, e: torch.Tensor) -> Sorted:
    a, b = a.minimum(b), a.maximum(b)
    d, e = d.minimum(e), d.maximum(e)
    c, e = c.minimum(e), c.maximum(e)
    c, d = c.minimum(d), c.maximum(d)
    b, e = b.minimum(e), b.maximum(e)
    a, d = a.minimum(d), a.maximum(d)
    a, c = a.minimum(c), a.maximum(c)
    b, d = b.minimum(d), b.maximum(d)
    b, c = b.minimum(c), b.maximum(c)
    return a, b, c, d, e


def _pyramid(frames: torch.Tensor, config: TVL1Config) -> list[torch.Tensor]:
    pyramid = [frames]
    while len(pyramid) < config.scales:
        height, width = (round(side * config.scale_step) for side in pyramid[-1].shape[-2:])
        if min(height, width) < SMALLEST_SIDE:
            break
        pyramid.append(_resize(pyramid[-1], (height, width), (1 / config.scale_step,) * 2))
    return pyramid


def _resize(images: torch.Tensor, size: tuple[int, int], steps: tuple[float, float]) -> torch.Tensor:
    """Resize (…, H, W) bilinearly; `steps` is the distance of new samples in old pixels, before sizes are rounded."""
    for dim, new, step in zip((-2, -1), size, steps, strict=True):
        old = images.shape[dim]
        place = ((torch.arange(new, dtype=torch.float64) + 0.5) * step - 0.5).clamp(0, old - 1)
        first = place.long()
        share = (place - first).float().to(images.device)
        if dim == -2:
            share = share[:, None]
        first = first.to(images.device)
        second = (first + 1).clamp(max=old - 1)
        images = images.index_select(dim, first) * (1 - share) + images.index_select(dim, second) * share
    return images


def _gradients(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Across and down: half the difference of the two neighbours; at the border half that to the only neighbour."""
    padded = F.pad(frames[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return across * 0.5, down * 0.5


@lru_cache
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The function compiled to few kernels on a GPU, if there is a C compiler: a step is bound by memory bandwidth."""
    has_compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    return torch.compile(function, dynamic=True) if device == "cuda" and has_compiler else function
