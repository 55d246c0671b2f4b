"""HTML and SVG from Python, with every text escaped unless it is markup already."""

from __future__ import annotations

import base64
from html import escape

import cv2
import numpy as np

_WITHOUT_END = ("br", "img", "meta")
_JPEG_QUALITY = 78


class Markup(str):
    """Text that is markup already, made by `tag` or `joined`."""


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element; a trailing underscore of an attribute's name is dropped, others become hyphens."""
    words = (f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    start = f"<{name}{''.join(words)}>"
    return Markup(start if name in _WITHOUT_END else f"{start}{joined(*children)}</{name}>")


def joined(*children: object) -> Markup:
    """Children one after another: markup as it is, anything else as text."""
    return Markup("".join(child if isinstance(child, Markup) else escape(str(child)) for child in children))


def jpeg_uri(picture_hw3: np.ndarray) -> str:
    """An RGB picture, uint8 (H, W, 3), as a data URI."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    return _data_uri("jpeg", cv2.imencode(".jpg", cv2.cvtColor(picture_hw3, cv2.COLOR_RGB2BGR), quality)[1])


def png_uri(picture: np.ndarray) -> str:
    """An RGB or RGBA picture, uint8 (H, W, 3 or 4), as a data URI, to the bit."""
    code = cv2.COLOR_RGBA2BGRA if picture.shape[2] == 4 else cv2.COLOR_RGB2BGR
    return _data_uri("png", cv2.imencode(".png", cv2.cvtColor(picture, code))[1])


def _data_uri(kind: str, data: np.ndarray) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"
