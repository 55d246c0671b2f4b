"""TV-L1 optical flow of many frame pairs at once, in plain PyTorch: one code for CPU and GPU.

Energy and scheme are OpenCV's DualTVL1 (Zach, Pock and Bischof 2007; Sánchez, Meinhardt-Llopis and Facciolo
2013): a pyramid, warps at every scale, and between two warps steps of the data term and of the dual of the total
variation in turn. What differs is how much of it is done, and that the work is laid out for the cache: whole planes,
in place, few passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  the name everybody knows it by

SMALLEST_SIDE = 16  # of a scale of the pyramid, as in OpenCV
FLAT = 1e-6  # squared image gradient under which the data term says nothing of the flow
ALIGNMENT = 64  # a plane's floats are a multiple of it: vector loops have no remainder, which could round otherwise
PAIRS_ON_CPU = 8  # solved together there: small scales are worth a batch, large ones want the cache to themselves


@dataclass(frozen=True)
class TVL1Config:
    """The energy and how far it is minimised; lambda, tau and the scale step are OpenCV's defaults.

    The rest is set for frames shrunk to 0.6 of a short side of 256 (docs/benchmarks.md).

    Attributes:
        attachment: λ, weight of the data term; grey levels go from 0 to 255.
        tightness: θ, how far the two halves of the split energy may part.
        time_step: τ of the dual's descent.
        scales: of the pyramid, the frame's own size included.
        scale_step: size of a scale over the next larger one's.
        warps: at every scale.
        iterations: between two warps.
    """

    attachment: float = 0.15
    tightness: float = 0.2
    time_step: float = 0.25
    scales: int = 4
    scale_step: float = 0.8
    warps: int = 2
    iterations: int = 15


def tvl1_flow(earlier: torch.Tensor, later: torch.Tensor, config: TVL1Config | None = None) -> torch.Tensor:
    """Flow of every pair from its earlier to its later frame.

    On the CPU it runs on one thread: a pair's flow is the same to the bit in any batch on any number of cores.

    Args:
        earlier: grey frames (B, H, W), uint8 or float32 from 0 to 255, both sides at least 16.
        later: the same shape.
        config: how it is done; the defaults are those of the shard build.

    Returns:
        float32 (B, 2, H, W), pixels across, then down, on the frames' device.
    """
    config = config or TVL1Config()
    on_cpu = earlier.device.type == "cpu"
    size = PAIRS_ON_CPU if on_cpu else len(earlier)
    with torch.inference_mode(), _one_thread(on_cpu):
        parts = zip(torch.split(earlier, size), torch.split(later, size), strict=True)
        return torch.cat([_solve(torch.stack(part).float(), config) for part in parts])


def _solve(frames: torch.Tensor, config: TVL1Config) -> torch.Tensor:
    """From the coarsest scale to the finest; frames float32 (2, B, H, W), earlier and later."""
    flow = None
    for scale in reversed(_pyramid(frames, config)):
        planes = _Planes(scale, config)
        if flow is not None:
            planes.start_from(flow)
        for _ in range(config.warps):
            planes.warp()
            planes.descend(config.iterations)
        flow = planes.flow()
    if flow is None:
        raise ValueError(f"a pyramid of {config.scales} scales")
    return flow


def _pyramid(frames: torch.Tensor, config: TVL1Config) -> list[torch.Tensor]:
    pyramid = [frames]
    for _ in range(config.scales - 1):
        height, width = (round(side * config.scale_step) for side in pyramid[-1].shape[-2:])
        if min(height, width) < SMALLEST_SIDE:
            break
        pyramid.append(_resized(pyramid[-1], height, width))
    return pyramid


class _Planes:
    """The variables of one scale.

    Every plane is flat, row after row, with zeros after its last row; so a neighbour is a fixed offset away in all of
    them at once, and an iteration is a handful of passes over contiguous memory. The flow is kept in units of θ/τ
    pixels, in which the steps need no factors of their own. The dual is zero on the last column and row (as OpenCV
    leaves it), and is what makes an offset across a row's end add nothing.
    """

    def __init__(self, frames: torch.Tensor, config: TVL1Config) -> None:
        _, self._batch, self._height, self._width = frames.shape
        pixels = self._height * self._width
        self._padded = -(-pixels // ALIGNMENT) * ALIGNMENT
        self._earlier, self._later = frames
        self._unit = config.tightness / config.time_step
        self._time_step = config.time_step
        self._limit = config.attachment * config.tightness / self._unit
        self._stack = torch.stack((self._later, *_central_gradients(self._later)), dim=1)
        self._flow = self._zeros(2)
        self._slope = self._zeros(2)  # gradient of the warped frame
        self._share = self._zeros(2)  # the same over its square: what one unit of flow takes off the residual
        self._residual = self._zeros(1)  # what the data term asks of a flow of zero, along the slope
        self._step = self._zeros(1)
        self._dual = self._zeros(4).view(2, 2, -1)  # direction of the derivative, component
        self._derivative = torch.zeros_like(self._dual)
        self._norm = self._zeros(2)

    def start_from(self, flow: torch.Tensor) -> None:
        """Take the flow (B, 2, h, w) of the next smaller scale."""
        height, width = flow.shape[-2:]
        larger = _resized(flow, self._height, self._width)
        across, down = self._pictures(self._flow)
        across.copy_(larger[:, 0] * (self._width / width / self._unit))
        down.copy_(larger[:, 1] * (self._height / height / self._unit))

    def flow(self) -> torch.Tensor:
        """(B, 2, H, W), in pixels of this scale."""
        return (self._pictures(self._flow) * self._unit).transpose(0, 1)

    def warp(self) -> None:
        """Take the later frame, and its gradients, to where the flow says, and make the data term linear there."""
        across, down = self._pictures(self._flow) * self._unit
        warped = F.grid_sample(self._stack, self._grid(across, down), padding_mode="zeros", align_corners=True)
        frame, slope_across, slope_down = warped.unbind(1)
        square = (slope_across * slope_across + slope_down * slope_down).clamp_(min=FLAT)
        residual = frame - self._earlier - slope_across * across - slope_down * down
        self._pictures(self._slope).copy_(torch.stack((slope_across, slope_down)))
        self._pictures(self._share).copy_(torch.stack((-slope_across / square, -slope_down / square)))
        self._pictures(self._residual).copy_((-residual / square / self._unit)[None])

    def descend(self, iterations: int) -> None:
        """So many steps of the flow and of its dual."""
        width = self._width
        flow, step, residual, norm = self._flow.view(-1), self._step.view(-1), self._residual.view(-1), self._norm
        dual, derivative = self._dual.view(2, -1), self._derivative.view(2, -1)
        last_column = self._pictures(self._derivative[0])[..., -1]
        before_next_plane = self._derivative[0].view(-1, self._padded)[:, -1]
        last_row = self._derivative[1].view(-1, self._padded)[:, (self._height - 1) * width :]
        for _ in range(iterations):
            # Data term: along the slope, as far as the residual asks but no further than the limit.
            torch.addcmul(residual, self._share[0], self._flow[0], out=step)
            step.addcmul_(self._share[1], self._flow[1]).clamp_(-self._limit, self._limit)
            self._flow.addcmul_(self._slope, step)
            # Smoothness: add the dual's divergence.
            flow.add_(dual[0])
            flow[1:].sub_(dual[0, :-1])
            flow.add_(dual[1])
            flow[width:].sub_(dual[1, :-width])
            torch.sub(flow[1:], flow[:-1], out=derivative[0, :-1])
            last_column.zero_()
            before_next_plane.zero_()
            torch.sub(flow[width:], flow[:-width], out=derivative[1, :-width])
            last_row.zero_()
            torch.mul(derivative[0], derivative[0], out=norm.view(-1))
            norm.view(-1).addcmul_(derivative[1], derivative[1]).sqrt_().add_(1)
            self._dual.add_(self._derivative, alpha=self._time_step).div_(norm)

    def _zeros(self, planes: int) -> torch.Tensor:
        return torch.zeros(planes, self._batch * self._padded, device=self._earlier.device)

    def _pictures(self, planes: torch.Tensor) -> torch.Tensor:
        """A view (C, B, H, W) of flat planes (C, …)."""
        pixels = self._height * self._width
        flat = planes.view(-1, self._batch, self._padded)[..., :pixels]
        return flat.view(-1, self._batch, self._height, self._width)

    def _grid(self, across: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Where each pixel is taken from, (B, H, W, 2) from -1 to 1."""
        device = self._earlier.device
        columns = torch.arange(self._width, dtype=torch.float32, device=device)
        rows = torch.arange(self._height, dtype=torch.float32, device=device)[:, None]
        return torch.stack(
            ((across + columns) * (2 / (self._width - 1)) - 1, (down + rows) * (2 / (self._height - 1)) - 1), dim=-1
        )


def _resized(planes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear, (…, H, W); not by `F.interpolate`, whose last bits depend on the batch."""
    for dim, size in ((-2, height), (-1, width)):
        old = planes.shape[dim]
        place = ((torch.arange(size, dtype=torch.float64) + 0.5) * (old / size) - 0.5).clamp(0, old - 1)
        first = place.long()
        share = (place - first).float().to(planes.device)
        if dim == -2:
            share = share[:, None]
        first = first.to(planes.device)
        second = (first + 1).clamp(max=old - 1)
        planes = planes.index_select(dim, first) * (1 - share) + planes.index_select(dim, second) * share
    return planes


def _central_gradients(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Across and down, each half the difference of the two neighbours; at the rim half that to the one there is."""
    padded = F.pad(frames, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return across.mul_(0.5), down.mul_(0.5)


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if wanted:
            torch.set_num_threads(threads)
