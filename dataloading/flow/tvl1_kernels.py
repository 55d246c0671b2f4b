"""The inner loops of TV-L1, for one pair of frames on one core; memory layout as in `padded_images`."""

from typing import Any

import numpy as np

from dataloading.flow.median import median, median_scratch_size
from dataloading.flow.padded_images import row_stride
from dataloading.flow.simd import (
    SIMD_WIDTH,
    broadcast,
    element_indices,
    fma,
    inlined,
    kernel,
    load,
    maximum,
    minimum,
    select_above,
    sqrt,
    store,
)
from dataloading.flow.tvl1_config import MEDIAN_EVERY
from dataloading.flow.tvl1_warp import linearise

FUSED_STEPS = 4  # in one sweep over the rows: the rows in flight fit into the first-level cache, the images do not
FUSE_AFTER = 4  # steps after a median; in the first ones a step may more than halve the error
FAR_FROM_CONVERGENCE = 3  # times the tolerance: the error does not fall below it in `FUSED_STEPS`
NUM_IMAGES = 13
DUAL, DATA, EARLIER = slice(4, 8), slice(8, 12), 12  # images of the dual, of the data term, and of the earlier frame

_ONE = np.float32(1)


def scratch_size(width: int) -> int:
    """Floats of the scratch buffer."""
    return max(median_scratch_size(width), FUSED_STEPS * SIMD_WIDTH)


@kernel
def solve(
    images: np.ndarray,
    sources: np.ndarray,
    scratch: np.ndarray,
    height: int,
    width: int,
    max_steps: np.ndarray,
    tightness: float,
    attachment: float,
    time_step: float,
    tolerance: float,
) -> int:
    """Iterate the flow of one scale until it converges.

    Args:
        images: float32 (13, padded_size): flow across and down, two spare images, the dual (across and down of the flow
            across, then of the flow down), four of the data term, the earlier frame. The dual starts at zero.
        sources: of the later frame, by `dataloading.flow.tvl1_warp.fill_sources`.
        scratch: float32 (scratch_size,).
        height: of the scale.
        width: of the scale.
        max_steps: int64 (warps,), largest number of steps after each warp.
        tightness: θ, float32.
        attachment: λ, float32.
        time_step: τ, float32.
        tolerance: a warp's steps end when the mean square of a step's change of the flow, in pixels, is below it.

    Returns:
        Index of the flow's first image: 0 or, if the spare images hold the flow, 2.
    """
    first = 0
    target_error = tolerance * height * width
    for limit in max_steps:
        flow = images[first : first + 2]
        linearise(flow, images[EARLIER], sources, images[DATA], height, width, attachment * tightness)
        done = 0
        error = np.inf
        while done < limit and error > target_error:
            since_median = done % MEDIAN_EVERY
            if since_median == 0:
                for component in range(2):
                    median(images[first + component], images[2 - first + component], scratch, height, width)
                first = 2 - first
            can_fuse = since_median >= FUSE_AFTER and error > FAR_FROM_CONVERGENCE * target_error
            steps = min(FUSED_STEPS if can_fuse else 1, limit - done, MEDIAN_EVERY - since_median)
            error = _sweep(images, first, scratch, height, width, steps, tightness, time_step / tightness)
            done += steps
    return first


@kernel
def _sweep(
    images: np.ndarray,
    first: int,
    scratch: np.ndarray,
    height: int,
    width: int,
    steps: int,
    tightness: float,
    rate: float,
) -> float:
    """Several steps of the flow and its dual in one pass over the rows; each step is one row behind the previous one.

    The scratch buffer holds a vector of sums of squared changes for every step; returns the sum of the last step.
    """
    u, v, dual, data = images[first], images[first + 1], images[DUAL], images[DATA]
    stride = row_stride(width)
    last = stride - 2 * SIMD_WIDTH  # first column of the row's last vector, which may reach beyond the row
    theta, tau, one = broadcast(np.float32(tightness)), broadcast(np.float32(rate)), broadcast(_ONE)
    indices = element_indices()
    interior = select_above(broadcast(np.float32(width - last)), indices, one)
    before_border = select_above(broadcast(np.float32(width - last - 1)), indices, one)
    scratch[: steps * SIMD_WIDTH] = 0
    for time in range(height + steps):
        for step in range(steps):
            y = time - step
            if y < 0 or y > height:
                continue
            row = (y + 1) * stride + SIMD_WIDTH
            above = row - stride
            if y < height:
                error = load(scratch, step * SIMD_WIDTH)
                for x in range(0, last, SIMD_WIDTH):
                    error = error + _flow_step(u, v, dual, data, row + x, above + x, theta)
                error = error + interior * _flow_step(u, v, dual, data, row + last, above + last, theta)
                store(scratch, step * SIMD_WIDTH, error)
            else:
                row = above  # no derivative below the last row
            if y > 0:
                for x in range(0, last, SIMD_WIDTH):
                    _dual_step(u, v, dual, above + x, row + x, tau, one, one)
                _dual_step(u, v, dual, above + last, row + last, tau, before_border, one)
    return float(scratch[(steps - 1) * SIMD_WIDTH : steps * SIMD_WIDTH].sum())


@inlined
def _flow_step(
    u: np.ndarray, v: np.ndarray, dual: np.ndarray, data: np.ndarray, at: int, above: int, theta: Any
) -> Any:
    """The step of the data term, along the slope by the residual, up to the limit; then that of the smoothness term."""
    flow_across, flow_down = load(u, at), load(v, at)
    slope_across, slope_down, limit = load(data[0], at), load(data[1], at), load(data[3], at)
    residual = fma(slope_down, flow_down, fma(slope_across, flow_across, load(data[2], at)))
    zero = broadcast(np.float32(0))
    step = zero - maximum(minimum(residual, limit), zero - limit)
    across = load(dual[0], at) - load(dual[0], at - 1) + (load(dual[1], at) - load(dual[1], above))
    down = load(dual[2], at) - load(dual[2], at - 1) + (load(dual[3], at) - load(dual[3], above))
    across = fma(theta, across, step * slope_across)
    down = fma(theta, down, step * slope_down)
    store(u, at, flow_across + across)
    store(v, at, flow_down + down)
    return fma(across, across, down * down)


@inlined
def _dual_step(
    u: np.ndarray, v: np.ndarray, dual: np.ndarray, at: int, below: int, tau: Any, before_border: Any, one: Any
) -> None:
    """One step of the duals p and q of the two flow components; both share one division."""
    p_across, p_down, q_across, q_down = dual
    u_here, v_here = load(u, at), load(v, at)
    u_across, u_down = (load(u, at + 1) - u_here) * before_border, load(u, below) - u_here
    v_across, v_down = (load(v, at + 1) - v_here) * before_border, load(v, below) - v_here
    p_length = fma(tau, sqrt(fma(u_across, u_across, u_down * u_down)), one)
    q_length = fma(tau, sqrt(fma(v_across, v_across, v_down * v_down)), one)
    both = one / (p_length * q_length)
    p_factor, q_factor = both * q_length, both * p_length
    store(p_across, at, fma(tau, u_across, load(p_across, at)) * p_factor)
    store(p_down, at, fma(tau, u_down, load(p_down, at)) * p_factor)
    store(q_across, at, fma(tau, v_across, load(q_across, at)) * q_factor)
    store(q_down, at, fma(tau, v_down, load(q_down, at)) * q_factor)
