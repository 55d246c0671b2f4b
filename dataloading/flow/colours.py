"""Flow as colours: the colour wheel of the Middlebury benchmark (Baker et al., A Database and Evaluation Methodology
for Optical Flow, IJCV 2011). Hue is the direction, saturation the speed.
"""

import numpy as np

# Steps from red to yellow, to green, to cyan, to blue, to magenta and back: fewer where the eye separates fewer hues.
_STEPS = (15, 6, 4, 11, 13, 6)
_CORNERS = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255), (255, 0, 0))
_BEYOND_RIM = 0.75  # brightness of colours beyond the wheel's rim


def flow_colours(flow_hw2: np.ndarray, full: float) -> np.ndarray:
    """Colours of a flow.

    Args:
        flow_hw2: float (H, W, 2), pixels to the right and down.
        full: length of the flow at the wheel's rim, in pixels; longer flow is darker.

    Returns:
        uint8 (H, W, 3), RGB: right is red, down yellow, left cyan, up violet, no motion white.
    """
    across, down = np.moveaxis(flow_hw2, 2, 0) / full
    angle = (np.arctan2(-down, -across) / np.pi + 1) / 2 * (len(_WHEEL) - 1)
    before = angle.astype(np.int64)
    share = (angle - before)[..., None]
    hue = (1 - share) * _WHEEL[before] + share * _WHEEL[(before + 1) % len(_WHEEL)]
    speed = np.hypot(across, down)[..., None]
    colours = np.where(speed <= 1, 1 - speed * (1 - hue), _BEYOND_RIM * hue)
    return np.asarray(255 * colours, dtype=np.uint8)


def colour_wheel(size: int) -> np.ndarray:
    """The legend: every direction and speed up to the rim, uint8 (size, size, 4), transparent outside."""
    steps = np.linspace(-1, 1, size)
    flow_hw2 = np.stack(np.meshgrid(steps, steps), axis=2)
    is_inside = np.hypot(*np.moveaxis(flow_hw2, 2, 0)) <= 1
    return np.dstack([flow_colours(flow_hw2, 1.0), np.where(is_inside, np.uint8(255), np.uint8(0))])


def _wheel() -> np.ndarray:
    """RGB from 0 to 1, (55, 3)."""
    corners = np.array(_CORNERS)
    arcs = [
        start + np.trunc(np.outer(np.arange(steps), end - start) / steps)
        for start, end, steps in zip(corners, corners[1:], _STEPS, strict=False)
    ]
    return np.concatenate(arcs) / 255


_WHEEL = _wheel()
