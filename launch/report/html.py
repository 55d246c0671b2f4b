"""Pages, elements and images in HTML and SVG: text is escaped unless it is SafeHtml."""

import base64
from collections.abc import Iterable
from html import escape

import cv2
import numpy as np

_VOID_ELEMENTS = ("br", "img", "meta")
_JPEG_QUALITY = 78
# Lets the browser load nothing from outside the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--soft:#5b6670;--paper:#f6f7f8;--card:#fff;--line:#d9dee3;
--accent:#0b6bcb;--fill:#0b6bcb26}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--soft:#9aa6b2;--paper:#12161a;--card:#1b2127;
--line:#323b44;--accent:#5eb1ff;--fill:#5eb1ff33}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.4rem;margin:.2rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0 0 .5rem;overflow-wrap:anywhere}
h3{font-size:.95rem;margin:1.2rem 0 .3rem}
p{margin:.2rem 0 .5rem;max-width:60rem}
.soft,figcaption,dt{color:var(--soft)}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:1rem;margin:0 0 1rem}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.grid>.card{margin:0}.grid{margin-bottom:1rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .9rem;margin:0}
dd{margin:0;overflow-wrap:anywhere}
.moments{display:grid;gap:.5rem;grid-template-columns:repeat(8,1fr)}
@media(min-width:50rem){section>dl.wide{grid-template-columns:max-content 1fr max-content 1fr}}
@media(max-width:50rem){.moments{grid-template-columns:repeat(4,1fr)}}
figure{margin:0}figcaption{font-size:.8rem}
figure svg,figure img{display:block;width:100%;height:auto;border-radius:.2rem;margin-bottom:.2rem}
.view{display:grid;gap:.3rem;grid-template-columns:repeat(3,1fr);align-items:start}
.pixels{image-rendering:pixelated}
.legend,.legend span{display:flex;gap:.2rem .8rem;align-items:center}.legend{flex-wrap:wrap}
.wheel{width:4rem;height:4rem;flex:none;background-size:cover}
.heat{width:8rem;height:.8rem;border-radius:.2rem;flex:none;background-size:100% 100%}
.curve{display:block;width:100%;max-width:36rem;height:auto}
.curve text{font-size:11px;fill:var(--soft)}
.curve .line{fill:none;stroke:var(--ink);stroke-width:1.2;vector-effect:non-scaling-stroke}
.curve .axis{stroke:var(--line);vector-effect:non-scaling-stroke}
.curve .best{fill:var(--fill)}
.curve .start line{stroke:var(--accent)}.curve .start circle{fill:var(--accent)}
.curve .start text{fill:var(--card);text-anchor:middle;dominant-baseline:central;font-weight:700}
@media(max-width:36rem){.curve text{font-size:14px}.curve circle{r:9px}}
.box{fill:none;stroke:#00d8ff}.region{fill:none;stroke:#fff;stroke-dasharray:4 3}
.box,.region{stroke-width:2;vector-effect:non-scaling-stroke}
.bars{max-height:19rem;overflow:auto;display:grid;gap:.15rem .6rem;align-items:center;
grid-template-columns:minmax(0,max-content) 1fr max-content}
.bars span{overflow-wrap:anywhere}.bars i{display:block;height:.7rem;background:var(--accent);border-radius:.1rem}
.bars b{font-weight:400;text-align:right;font-variant-numeric:tabular-nums}
summary{cursor:pointer}ul{margin:.2rem 0;padding-left:1.2rem;overflow-wrap:anywhere}
"""


class SafeHtml(str):
    """Escaped HTML or SVG, made by `tag` or `fragment`."""


def tag(name: str, /, *children: object, **attributes: object) -> SafeHtml:
    """An element; `class_` becomes the attribute `class`, and `aria_label` becomes `aria-label`."""
    pairs = (f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    start = f"<{name}{''.join(pairs)}>"
    return SafeHtml(start if name in _VOID_ELEMENTS else f"{start}{fragment(*children)}</{name}>")


def fragment(*children: object) -> SafeHtml:
    """Concatenate children; escape all that are not SafeHtml."""
    return SafeHtml("".join(child if isinstance(child, SafeHtml) else escape(str(child)) for child in children))


def bars(rows: Iterable[tuple[str, float, str]]) -> SafeHtml:
    """Horizontal bars, each with a name, a length in per cent and a label."""
    cells = (
        fragment(tag("span", name), tag("i", style=f"width:{percent:.1f}%"), tag("b", label))
        for name, percent, label in rows
    )
    return tag("div", *cells, class_="bars")


def html_page(title: str, *parts: SafeHtml, style: str = "") -> str:
    """A self-contained page without scripts or requests, for desktop and phone; `style` extends the common style."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", SafeHtml(STYLE + style)),
    )
    body = tag("body", tag("h1", title), *parts)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def jpeg_uri(image_hw3: np.ndarray) -> str:
    """An RGB image, uint8 (H, W, 3), as a data URI."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    return _data_uri("jpeg", cv2.imencode(".jpg", cv2.cvtColor(image_hw3, cv2.COLOR_RGB2BGR), quality)[1])


def png_uri(image: np.ndarray) -> str:
    """An RGB or RGBA image, uint8 (H, W, 3 or 4), as a lossless data URI."""
    code = cv2.COLOR_RGBA2BGRA if image.shape[2] == 4 else cv2.COLOR_RGB2BGR
    return _data_uri("png", cv2.imencode(".png", cv2.cvtColor(image, code))[1])


def _data_uri(kind: str, data: np.ndarray) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"
