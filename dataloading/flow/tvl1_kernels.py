"""What TV-L1 spends its time in, one pair of frames at a time on one core; memory layout as in `padded_images`."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataloading.flow.median import median, median_scratch_size
from dataloading.flow.padded_images import stride
from dataloading.flow.simd import (
    LANES,
    fused,
    inlined,
    kernel,
    larger,
    load,
    numbered,
    root,
    smaller,
    spread,
    store,
    where_above,
)
from dataloading.flow.tvl1_warp import linearise

MEDIAN_EVERY = 30  # steps, as in OpenCV
STEPS_AHEAD = 4  # made in one sweep over the rows: the rows in flight fit the first-level cache, the planes do not
SETTLED_AFTER = 4  # steps, in which the error falls by more than half at once
FAR = 3  # times the error at rest, which it does not fall to in so few steps
NUM_PLANES = 13
DUAL, DATA, EARLIER = slice(4, 8), slice(8, 12), 12  # planes: four, four and the earlier frame

_ONE = np.float32(1)


def scratch_size(width: int) -> int:
    """Floats of the scratch space."""
    return max(median_scratch_size(width), STEPS_AHEAD * LANES)


@kernel
def solve(
    planes: np.ndarray,
    pictures: np.ndarray,
    scratch: np.ndarray,
    height: int,
    width: int,
    most_steps: np.ndarray,
    tightness: float,
    attachment: float,
    time_step: float,
    rest: float,
) -> int:
    """Bring the flow of one scale to rest.

    Args:
        planes: float32 (13, plane_size): flow across and down, two spare ones, the dual (across and down of the flow
            across, then of the flow down), four of the data term, the earlier frame. The dual is zero at first.
        pictures: of the later frame, by `dataloading.flow.tvl1_warp.fill_pictures`.
        scratch: float32 (scratch_size,).
        height: of the scale.
        width: of the scale.
        most_steps: int64 (warps,), how many steps may follow each warp.
        tightness: θ, float32.
        attachment: λ, float32.
        time_step: τ, float32.
        rest: mean square of a step's change of the flow, in pixels, that ends a warp's steps.

    Returns:
        the plane that the flow begins at: 0 or, where the spare ones hold it, 2.
    """
    first = 0
    still = rest * height * width
    for most in most_steps:
        flow = planes[first : first + 2]
        linearise(flow, planes[EARLIER], pictures, planes[DATA], height, width, attachment * tightness)
        taken = 0
        error = np.inf
        while taken < most and error > still:
            if taken % MEDIAN_EVERY == 0:
                for component in range(2):
                    median(planes[first + component], planes[2 - first + component], scratch, height, width)
                first = 2 - first
            settled = taken % MEDIAN_EVERY >= SETTLED_AFTER and error > FAR * still
            steps = min(STEPS_AHEAD if settled else 1, most - taken, MEDIAN_EVERY - taken % MEDIAN_EVERY)
            error = _sweep(planes, first, scratch, height, width, steps, tightness, time_step / tightness)
            taken += steps
    return first


@kernel
def _sweep(
    planes: np.ndarray,
    first: int,
    scratch: np.ndarray,
    height: int,
    width: int,
    steps: int,
    tightness: float,
    rate: float,
) -> float:
    """So many steps of the flow and of its dual in one pass over the rows, each step a row behind the one before.

    Returns the last step's sum of squared changes, which the scratch space holds for every step, lane by lane.
    """
    u, v, dual, data = planes[first], planes[first + 1], planes[DUAL], planes[DATA]
    stride_ = stride(width)
    last = stride_ - 2 * LANES  # where the last sixteen columns of a row begin, and those beyond it
    theta, tau, one = spread(np.float32(tightness)), spread(np.float32(rate)), spread(_ONE)
    lanes = numbered()
    inside = where_above(spread(np.float32(width - last)), lanes, one)
    before_border = where_above(spread(np.float32(width - last - 1)), lanes, one)
    scratch[: steps * LANES] = 0
    for time in range(height + steps):
        for step in range(steps):
            y = time - step
            if y < 0 or y > height:
                continue
            row = (y + 1) * stride_ + LANES
            above = row - stride_
            if y < height:
                error = load(scratch, step * LANES)
                for x in range(0, last, LANES):
                    error = error + _flow_step(u, v, dual, data, row + x, above + x, theta)
                error = error + inside * _flow_step(u, v, dual, data, row + last, above + last, theta)
                store(scratch, step * LANES, error)
            else:
                row = above  # nothing below the last row: no derivative
            if y > 0:
                for x in range(0, last, LANES):
                    _dual_step(u, v, dual, above + x, row + x, tau, one, one)
                _dual_step(u, v, dual, above + last, row + last, tau, before_border, one)
    return float(scratch[(steps - 1) * LANES : steps * LANES].sum())


@inlined
def _flow_step(
    u: np.ndarray, v: np.ndarray, dual: np.ndarray, data: np.ndarray, at: int, above: int, theta: Any
) -> Any:
    """Data term, along the slope as far as the residual asks but no further than the limit; then smoothness."""
    flow_across, flow_down = load(u, at), load(v, at)
    slope_across, slope_down, limit = load(data[0], at), load(data[1], at), load(data[3], at)
    residual = fused(slope_down, flow_down, fused(slope_across, flow_across, load(data[2], at)))
    zero = spread(np.float32(0))
    step = zero - larger(smaller(residual, limit), zero - limit)
    across = load(dual[0], at) - load(dual[0], at - 1) + (load(dual[1], at) - load(dual[1], above))
    down = load(dual[2], at) - load(dual[2], at - 1) + (load(dual[3], at) - load(dual[3], above))
    across = fused(theta, across, step * slope_across)
    down = fused(theta, down, step * slope_down)
    store(u, at, flow_across + across)
    store(v, at, flow_down + down)
    return fused(across, across, down * down)


@inlined
def _dual_step(
    u: np.ndarray, v: np.ndarray, dual: np.ndarray, at: int, below: int, tau: Any, before_border: Any, one: Any
) -> None:
    """One step of the duals p and q of the flow's two components; both share one division."""
    p_across, p_down, q_across, q_down = dual
    here, there = load(u, at), load(v, at)
    u_across, u_down = (load(u, at + 1) - here) * before_border, load(u, below) - here
    v_across, v_down = (load(v, at + 1) - there) * before_border, load(v, below) - there
    p_length = fused(tau, root(fused(u_across, u_across, u_down * u_down)), one)
    q_length = fused(tau, root(fused(v_across, v_across, v_down * v_down)), one)
    both = one / (p_length * q_length)
    p_factor, q_factor = both * q_length, both * p_length
    store(p_across, at, fused(tau, u_across, load(p_across, at)) * p_factor)
    store(p_down, at, fused(tau, u_down, load(p_down, at)) * p_factor)
    store(q_across, at, fused(tau, v_across, load(q_across, at)) * q_factor)
    store(q_down, at, fused(tau, v_down, load(q_down, at)) * q_factor)
