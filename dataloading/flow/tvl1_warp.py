"""TV-L1's data term: the later frame, and its gradients, taken to where the flow says, by OpenCV's cubic."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataloading.flow.padded_images import stride
from dataloading.flow.simd import (
    LANES,
    blend,
    first_of,
    floor,
    fused,
    inlined,
    kernel,
    lanes_at,
    lanes_with,
    larger,
    load,
    lowest,
    numbered,
    root,
    smaller,
    spread,
    store,
    where_above,
    whole,
)

RIM = 4  # zeros around a picture that is warped: the reach of a cubic, and where pixels from far outside are taken
FLAT = np.float32(1.1920929e-7)  # squared image gradient under which the data term says nothing of the flow, as there

ALL = np.uint32(2**LANES - 1)  # lanes
_ONE = np.float32(1)
_HALF = np.float32(0.5)


@kernel
def _picture_stride(width: int) -> int:
    return LANES * (-(-(width + 2 * RIM) // LANES))


@kernel
def _picture_start(width: int) -> int:
    """Where the first pixel of a picture with a rim is."""
    return RIM * _picture_stride(width) + RIM + LANES


def picture_size(height: int, width: int) -> int:
    """Floats of a picture with its rim, and what vectors may read beyond: a row, and their own length."""
    return int((height + 2 * RIM + 1) * _picture_stride(width) + 4 * LANES)


@kernel
def fill_pictures(frame: np.ndarray, pictures: np.ndarray, height: int, width: int) -> None:
    """Put a frame (H, W) and its gradients, across and down, into three pictures, whose rims stay zero.

    A gradient is half the difference of the two neighbours; at the border half that to the one there is.
    """
    picture, across, down = pictures
    step, half = _picture_stride(width), spread(_HALF)
    for y in range(height):
        start = _picture_start(width) + y * step
        picture[start : start + width] = frame[y]
    for y in range(height):
        row = _picture_start(width) + y * step
        above, below = row - step * min(y, 1), row + step * min(height - 1 - y, 1)
        for x in range(0, width, LANES):
            store(across, row + x, half * (load(picture, row + x + 1) - load(picture, row + x - 1)))
            store(down, row + x, half * (load(picture, below + x) - load(picture, above + x)))
        across[row] = _HALF * (picture[row + 1] - picture[row])
        across[row + width - 1] = _HALF * (picture[row + width - 1] - picture[row + width - 2])
        across[row + width : row + step] = 0  # what the vectors wrote beyond the row
        down[row + width : row + step] = 0


@kernel
def linearise(
    flow: np.ndarray, earlier: np.ndarray, pictures: np.ndarray, data: np.ndarray, height: int, width: int, limit: float
) -> None:
    """Warp the later frame and its gradients by the flow, and make the data term linear there.

    Args:
        flow: planes (2, plane_size), across and down.
        earlier: the plane of the earlier frame.
        pictures: of the later frame, by `fill_pictures`.
        data: planes (4, plane_size) to be filled: slope across and down, of length 1; the residual at a flow of zero
            along it; how far along it a step may go.
        height: of the planes.
        width: of the planes.
        limit: λθ.

    Sixteen neighbours mostly move by the same whole pixels, so their surroundings are taken as
    vectors: once for every different shift among them.
    """
    u, v = flow
    picture, across, down = pictures
    across_out, down_out, residual_out, limit_out = data
    stride_, picture_stride = stride(width), _picture_stride(width)
    corner = _picture_start(width) - picture_stride - 1  # of the 4×4 surroundings of the first pixel
    lanes, flat, largest = numbered(), spread(FLAT), spread(np.float32(limit))
    # Outside by more than the cubic's reach is as good as anywhere outside.
    margin, rightmost, bottom = spread(np.float32(-3)), spread(np.float32(width + 1)), spread(np.float32(height + 1))
    for y in range(height):
        for x in range(0, width, LANES):
            at = (y + 1) * stride_ + LANES + x
            flow_across, flow_down = load(u, at), load(v, at)
            place_x = smaller(larger(flow_across + (spread(np.float32(x)) + lanes), margin), rightmost)
            place_y = smaller(larger(flow_down + spread(np.float32(y)), margin), bottom)
            left, top = floor(place_x), floor(place_y)
            weights_x, weights_y = _cubic_weights(place_x - left), _cubic_weights(place_y - top)
            shift_x = left - lanes
            shifts = whole(shift_x + top * spread(np.float32(picture_stride)))  # exact: far below 2^24
            shift = first_of(shifts, ALL)
            if lanes_with(shifts, shift) == ALL:
                start = corner + shift
                value = _four_by_four(picture, start, picture_stride, weights_x, weights_y)
                slope_across = _four_by_four(across, start, picture_stride, weights_x, weights_y)
                slope_down = _four_by_four(down, start, picture_stride, weights_x, weights_y)
            else:
                leftmost, topmost = lowest(shift_x), lowest(top)
                in_left, in_top = lanes_at(shift_x, leftmost), lanes_at(top, topmost)
                near = (in_left | lanes_at(shift_x, leftmost + _ONE)) & (in_top | lanes_at(top, topmost + _ONE))
                start = corner + int(leftmost) + int(topmost) * picture_stride
                five_x, five_y = _five_weights(weights_x, in_left), _five_weights(weights_y, in_top)
                value = _five_by_five(picture, start, picture_stride, five_x, five_y)
                slope_across = _five_by_five(across, start, picture_stride, five_x, five_y)
                slope_down = _five_by_five(down, start, picture_stride, five_x, five_y)
                open_lanes = ALL & ~near
                while open_lanes:
                    shift = first_of(shifts, open_lanes)
                    same = lanes_with(shifts, shift)
                    start = corner + shift
                    value = blend(same, _four_by_four(picture, start, picture_stride, weights_x, weights_y), value)
                    sample = _four_by_four(across, start, picture_stride, weights_x, weights_y)
                    slope_across = blend(same, sample, slope_across)
                    sample = _four_by_four(down, start, picture_stride, weights_x, weights_y)
                    slope_down = blend(same, sample, slope_down)
                    open_lanes &= ~same
            square = slope_across * slope_across + slope_down * slope_down
            inverse = where_above(square, flat, spread(_ONE) / root(square))
            residual = value - slope_across * flow_across - slope_down * flow_down - load(earlier, at)
            store(across_out, at, slope_across * inverse)
            store(down_out, at, slope_down * inverse)
            store(residual_out, at, residual * inverse)
            store(limit_out, at, largest * (square * inverse))


@inlined
def _cubic_weights(place: Any) -> Any:
    """Of the four neighbours of a place between the second and the third: Keys' cubic with a = −0.75, as in OpenCV.

    To the bit as there: on what stands still the flow is rounding, and its sign decides a byte.
    """
    one, a = spread(_ONE), spread(np.float32(-0.75))
    rest = one - place
    first, last = a * (place * (rest * rest)), a * (place * place * rest)
    second = fused(fused(spread(np.float32(1.25)), place, spread(np.float32(-2.25))), place * place, one)
    return first, second, one - first - second - last, last


@inlined
def _five_weights(weights: Any, in_first: int) -> Any:
    """The four weights as five: the last is 0 in the lanes that begin at the first neighbour, in others the first."""
    zero = spread(np.float32(0))
    return (
        blend(in_first, weights[0], zero),
        blend(in_first, weights[1], weights[0]),
        blend(in_first, weights[2], weights[1]),
        blend(in_first, weights[3], weights[2]),
        blend(in_first, zero, weights[3]),
    )


@inlined
def _four_by_four(picture: np.ndarray, start: int, step: int, across: Any, down: Any) -> Any:
    value = _four(picture, start, across) * down[0]
    value = fused(_four(picture, start + step, across), down[1], value)
    value = fused(_four(picture, start + 2 * step, across), down[2], value)
    return fused(_four(picture, start + 3 * step, across), down[3], value)


@inlined
def _five_by_five(picture: np.ndarray, start: int, step: int, across: Any, down: Any) -> Any:
    value = _five(picture, start, across) * down[0]
    value = fused(_five(picture, start + step, across), down[1], value)
    value = fused(_five(picture, start + 2 * step, across), down[2], value)
    value = fused(_five(picture, start + 3 * step, across), down[3], value)
    return fused(_five(picture, start + 4 * step, across), down[4], value)


@inlined
def _four(picture: np.ndarray, start: int, weights: Any) -> Any:
    value = load(picture, start) * weights[0]
    value = fused(load(picture, start + 1), weights[1], value)
    value = fused(load(picture, start + 2), weights[2], value)
    return fused(load(picture, start + 3), weights[3], value)


@inlined
def _five(picture: np.ndarray, start: int, weights: Any) -> Any:
    return fused(load(picture, start + 4), weights[4], _four(picture, start, weights))
