"""TV-L1's data term: the later frame and its gradients, warped by the flow with OpenCV's cubic interpolation."""

from typing import Any

import numpy as np

from dataloading.flow.padded_images import row_stride
from dataloading.flow.simd import (
    SIMD_WIDTH,
    blend,
    broadcast,
    element_indices,
    first_selected,
    floor,
    fma,
    inlined,
    kernel,
    load,
    mask_equal,
    mask_equal_int,
    maximum,
    minimum,
    reduce_min,
    select_above,
    sqrt,
    store,
    to_int,
)
from dataloading.flow.tvl1_config import FLAT

RIM = 4  # zeros around a source of the warp: the reach of a cubic, and the value of pixels far outside
ALL = np.uint32(2**SIMD_WIDTH - 1)  # mask of all elements of a vector

_FLAT = np.float32(FLAT)
_ONE = np.float32(1)
_HALF = np.float32(0.5)


@kernel
def _source_stride(width: int) -> int:
    return SIMD_WIDTH * (-(-(width + 2 * RIM) // SIMD_WIDTH))


@kernel
def _source_start(width: int) -> int:
    """Index of the first pixel of a source inside its rim."""
    return RIM * _source_stride(width) + RIM + SIMD_WIDTH


def source_size(height: int, width: int) -> int:
    """Floats of a source with its rim, and of what vectors may read beyond it: a row, and their own length."""
    return int((height + 2 * RIM + 1) * _source_stride(width) + 4 * SIMD_WIDTH)


@kernel
def fill_sources(frame: np.ndarray, sources: np.ndarray, height: int, width: int) -> None:
    """Put a frame (H, W) and its gradients, across and down, into three sources, whose rims stay zero.

    A gradient is half the difference of the two neighbours; at the border half that to the only neighbour.
    """
    source, across, down = sources
    step, half = _source_stride(width), broadcast(_HALF)
    for y in range(height):
        start = _source_start(width) + y * step
        source[start : start + width] = frame[y]
    for y in range(height):
        row = _source_start(width) + y * step
        above, below = row - step * min(y, 1), row + step * min(height - 1 - y, 1)
        for x in range(0, width, SIMD_WIDTH):
            store(across, row + x, half * (load(source, row + x + 1) - load(source, row + x - 1)))
            store(down, row + x, half * (load(source, below + x) - load(source, above + x)))
        across[row] = _HALF * (source[row + 1] - source[row])
        across[row + width - 1] = _HALF * (source[row + width - 1] - source[row + width - 2])
        across[row + width : row + step] = 0  # the vectors wrote beyond the row
        down[row + width : row + step] = 0


@kernel
def linearise(
    flow: np.ndarray, earlier: np.ndarray, sources: np.ndarray, data: np.ndarray, height: int, width: int, limit: float
) -> None:
    """Warp the later frame and its gradients by the flow, and linearise the data term there.

    Args:
        flow: images (2, padded_size), across and down.
        earlier: the image of the earlier frame.
        sources: of the later frame, by `fill_sources`.
        data: images (4, padded_size) to fill: slope across and down, of length 1; the residual at a flow of zero along
            it; limit of a step along it.
        height: of the images.
        width: of the images.
        limit: λθ.
    """
    u, v = flow
    across_out, down_out, residual_out, limit_out = data
    stride = row_stride(width)
    indices, flat, largest = element_indices(), broadcast(_FLAT), broadcast(np.float32(limit))
    # All places outside by more than the cubic's reach are equivalent.
    margin, right = broadcast(np.float32(-3)), broadcast(np.float32(width + 1))
    bottom = broadcast(np.float32(height + 1))
    for y in range(height):
        for x in range(0, width, SIMD_WIDTH):
            at = (y + 1) * stride + SIMD_WIDTH + x
            flow_across, flow_down = load(u, at), load(v, at)
            place_x = minimum(maximum(flow_across + (broadcast(np.float32(x)) + indices), margin), right)
            place_y = minimum(maximum(flow_down + broadcast(np.float32(y)), margin), bottom)
            value, slope_across, slope_down = _sample(sources, place_x, place_y, indices, width)
            square = slope_across * slope_across + slope_down * slope_down
            inverse = select_above(square, flat, broadcast(_ONE) / sqrt(square))
            residual = value - slope_across * flow_across - slope_down * flow_down - load(earlier, at)
            store(across_out, at, slope_across * inverse)
            store(down_out, at, slope_down * inverse)
            store(residual_out, at, residual * inverse)
            store(limit_out, at, largest * (square * inverse))


@inlined
def _sample(sources: np.ndarray, place_x: Any, place_y: Any, indices: Any, width: int) -> Any:
    """The three sources at the places of sixteen neighbouring pixels.

    Neighbours mostly move by the same number of whole pixels, so their surroundings are loaded as vectors: once for
    every different shift among them.
    """
    stride = _source_stride(width)
    corner = _source_start(width) - stride - 1  # of the 4×4 surroundings of the first pixel
    left, top = floor(place_x), floor(place_y)
    weights_x, weights_y = _cubic_weights(place_x - left), _cubic_weights(place_y - top)
    shift_x = left - indices
    shifts = to_int(shift_x + top * broadcast(np.float32(stride)))  # exact: far below 2^24
    shift = first_selected(shifts, ALL)
    if mask_equal_int(shifts, shift) == ALL:
        return _four_by_four_of_each(sources, corner + shift, stride, weights_x, weights_y)
    leftmost, topmost = reduce_min(shift_x), reduce_min(top)
    in_left, in_top = mask_equal(shift_x, leftmost), mask_equal(top, topmost)
    near = (in_left | mask_equal(shift_x, leftmost + _ONE)) & (in_top | mask_equal(top, topmost + _ONE))
    start = corner + int(leftmost) + int(topmost) * stride
    five_x, five_y = _five_weights(weights_x, in_left), _five_weights(weights_y, in_top)
    value = _five_by_five(sources[0], start, stride, five_x, five_y)
    across = _five_by_five(sources[1], start, stride, five_x, five_y)
    down = _five_by_five(sources[2], start, stride, five_x, five_y)
    remaining = ALL & ~near
    while remaining:
        shift = first_selected(shifts, remaining)
        same = mask_equal_int(shifts, shift)
        samples = _four_by_four_of_each(sources, corner + shift, stride, weights_x, weights_y)
        value, across, down = (
            blend(same, samples[0], value),
            blend(same, samples[1], across),
            blend(same, samples[2], down),
        )
        remaining &= ~same
    return value, across, down


@inlined
def _cubic_weights(place: Any) -> Any:
    """Weights of the four neighbours of a place between the second and third: Keys' cubic with a = −0.75, as in OpenCV.

    Equal to OpenCV's to the bit: the flow of a still region is rounding error, and its sign decides a byte.
    """
    one, a = broadcast(_ONE), broadcast(np.float32(-0.75))
    tolerance = one - place
    first, last = a * (place * (tolerance * tolerance)), a * (place * place * tolerance)
    second = fma(fma(broadcast(np.float32(1.25)), place, broadcast(np.float32(-2.25))), place * place, one)
    return first, second, one - first - second - last, last


@inlined
def _five_weights(weights: Any, in_first: int) -> Any:
    """The four weights as five: the last is 0 in elements that start at the first neighbour, else the first is 0."""
    zero = broadcast(np.float32(0))
    return (
        blend(in_first, weights[0], zero),
        blend(in_first, weights[1], weights[0]),
        blend(in_first, weights[2], weights[1]),
        blend(in_first, weights[3], weights[2]),
        blend(in_first, zero, weights[3]),
    )


@inlined
def _four_by_four_of_each(sources: np.ndarray, start: int, step: int, across: Any, down: Any) -> Any:
    return (
        _four_by_four(sources[0], start, step, across, down),
        _four_by_four(sources[1], start, step, across, down),
        _four_by_four(sources[2], start, step, across, down),
    )


@inlined
def _four_by_four(source: np.ndarray, start: int, step: int, across: Any, down: Any) -> Any:
    value = _four(source, start, across) * down[0]
    value = fma(_four(source, start + step, across), down[1], value)
    value = fma(_four(source, start + 2 * step, across), down[2], value)
    return fma(_four(source, start + 3 * step, across), down[3], value)


@inlined
def _five_by_five(source: np.ndarray, start: int, step: int, across: Any, down: Any) -> Any:
    value = _five(source, start, across) * down[0]
    value = fma(_five(source, start + step, across), down[1], value)
    value = fma(_five(source, start + 2 * step, across), down[2], value)
    value = fma(_five(source, start + 3 * step, across), down[3], value)
    return fma(_five(source, start + 4 * step, across), down[4], value)


@inlined
def _four(source: np.ndarray, start: int, weights: Any) -> Any:
    value = load(source, start) * weights[0]
    value = fma(load(source, start + 1), weights[1], value)
    value = fma(load(source, start + 2), weights[2], value)
    return fma(load(source, start + 3), weights[3], value)


@inlined
def _five(source: np.ndarray, start: int, weights: Any) -> Any:
    return fma(load(source, start + 4), weights[4], _four(source, start, weights))
