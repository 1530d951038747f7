"""One self-contained page: text, tables and embedded images; no script, no font, no address of anything else.

The page's own security policy forbids the browser to load anything, so it cannot ask the network even by mistake.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from dtl.report.grids import MARKS, tile_image

if TYPE_CHECKING:
    from dtl.report.examples import Tile

_TILE_SIDE = 160  # pixels: more than they are shown with, for sharp screens
_PIXELATED = 64


@dataclass(frozen=True)
class Cell:
    """A table's cell; a number is set to the right."""

    text: str
    number: bool = False


def page(title: str, lead: str, sections: Sequence[str], *, footer: str) -> str:
    """The whole document. `title` is text, `lead` and `sections` are HTML."""
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{lead}
</header>
<main>
{body}
</main>
<footer>{escape(footer)}</footer>
</body>
</html>
"""


def section(heading: str, *parts: str) -> str:
    inner = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{inner}\n</section>"


def subheading(words: str) -> str:
    return f"<h3>{escape(words)}</h3>"


def text(words: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f"<p{mark}>{escape(words)}</p>"


def bullets(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def headline(numbers: Sequence[tuple[str, str]]) -> str:
    """The few numbers that matter: (value, what it is)."""
    items = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(what)}</dt></div>" for value, what in numbers)
    return f'<dl class="headline">{items}</dl>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{items}</dl>'


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, compact: bool = False) -> str:
    """In a narrow window each row becomes a small card, so that nothing has to be scrolled sideways; a `compact` table fits as it is."""
    numbers = [all(row[i].number or row[i].text == "–" for row in rows) for i in range(len(columns))]
    head = "".join(f'<th scope="col"{_number(right)}>{escape(name)}</th>' for name, right in zip(columns, numbers))
    lines = []
    for row in rows:
        cells = [f'<th scope="row">{escape(row[0].text)}</th>']
        cells += [f'<td data-label="{escape(name)}"{_number(right)}>{escape(cell.text)}</td>' for name, cell, right in zip(columns[1:], row[1:], numbers[1:])]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    kind = "compact" if compact else "cards"
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def plot(file: Path, alt: str, *, width: int, caption: str = "", narrow: Path | None = None) -> str:
    """A PNG with dark ink on white; dark windows show it with light ink on black. `narrow` is the PNG for narrow windows."""
    source, size = _embedded(file)
    image = f'<img src="{source}" alt="{escape(alt)}" {size}>'
    if narrow is not None:
        source, size = _embedded(narrow)
        image = f'<picture><source media="(max-width: 40rem)" srcset="{source}" {size}>{image}</picture>'
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="plot" style="max-width:{round(width * 1.2)}px">{image}{words}</figure>'


def _embedded(file: Path) -> tuple[str, str]:
    """A PNG as an address that holds it, and its size as attributes, so that the page does not jump while it loads."""
    from PIL import Image

    with Image.open(file) as image:
        size = f'width="{image.width}" height="{image.height}"'
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}", size


def beside(*parts: str) -> str:
    """Next to each other where there is room."""
    return '<div class="beside">' + "".join(f"<div>{part}</div>" for part in parts if part) + "</div>"


def tiles(shown: Sequence[Tile], *, fours: bool = False) -> str:
    """A grid that fits the window; with `fours` each row holds whole fours."""
    return f'<div class="tiles{" fours" if fours else ""}">' + "".join(_tile(tile) for tile in shown) + "</div>"


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(body)}</pre></details>"


def _tile(tile: Tile) -> str:
    verdict = {True: "right", False: "wrong", None: "plain"}[tile.right]
    mark = f'<span aria-hidden="true">{MARKS[tile.right]}</span> ' if tile.right is not None else ""
    note = f"<small>{escape(tile.note)}</small>" if tile.note else ""
    image = tile_image(tile, _TILE_SIDE)
    small = ' class="pixels"' if tile.pixels.shape[1] <= _PIXELATED else ""
    source = _encoded(tile, image)
    return (
        f'<figure class="{verdict}"><img{small} src="{source}" alt="{escape(tile.words)}" width="{image.width}" height="{image.height}">'
        f"<figcaption>{mark}{escape(tile.caption)}{note}</figcaption></figure>"
    )


def _encoded(tile: Tile, image: object) -> str:
    """Small images as they are, enlarged by the browser; photos as JPEG, a tenth of the bytes."""
    from PIL import Image

    data = io.BytesIO()
    if tile.pixels.shape[1] <= _PIXELATED:
        Image.fromarray(tile.pixels).save(data, "PNG")
        kind = "png"
    else:
        assert isinstance(image, Image.Image)
        image.save(data, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def _number(right: bool) -> str:
    return ' class="n"' if right else ""


_STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--soft:#5f5f5f;--line:#dedede;--paper:#fff;--wash:#f5f5f3;--right:#00734f;--wrong:#c22b20}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e6;--soft:#a3a3a0;--line:#363636;--paper:#121212;--wash:#1d1d1d;--right:#3ecf9a;--wrong:#ff8272}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:66rem;padding:2.5rem 1.5rem 3rem;background:var(--paper);color:var(--ink);
 font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.9rem;line-height:1.2;margin:0;font-weight:650;letter-spacing:-.01em}
h2{font-size:1.15rem;margin:0 0 .8rem;font-weight:650}
h3{font-size:1rem;margin:1.6rem 0 .6rem;font-weight:600}
p{margin:0 0 .9rem;max-width:44rem}
.soft,figcaption,footer,.facts dt,.headline dt{color:var(--soft)}
section{border-top:1px solid var(--line);padding-top:1.3rem;margin-top:2.4rem}
.headline{display:flex;flex-wrap:wrap;gap:.6rem 2.6rem;margin:1.4rem 0 1.2rem}
.headline dd{margin:0;font-size:2.1rem;line-height:1.15;font-weight:650;font-variant-numeric:tabular-nums}
.headline dt{font-size:.9rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.7rem 1.6rem;margin:0}
.facts dt{font-size:.85rem}
.facts dd{margin:0}
table{border-collapse:collapse;width:100%;margin-bottom:.8rem;font-variant-numeric:tabular-nums;font-size:.94rem}
th,td{padding:.42rem 1.4rem .42rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{font-weight:500;color:var(--soft);font-size:.85rem}
tbody th{font-weight:600}
.n{text-align:right;white-space:nowrap;overflow-wrap:normal}
th:last-child,td:last-child{padding-right:0}
figure{margin:0}
.plot img{display:block;width:100%;height:auto}
figcaption{font-size:.88rem;line-height:1.4;margin-top:.35rem}
@media(prefers-color-scheme:dark){.plot img{filter:invert(.93) hue-rotate(180deg)}}
.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.6rem 2.4rem;align-items:start}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.4rem,1fr));gap:1rem .8rem}
.tiles img{display:block;width:100%;height:auto;aspect-ratio:1;background:var(--wash)}
.tiles .pixels{image-rendering:pixelated}
.tiles figcaption{font-size:.85rem;line-height:1.3}
.tiles small{display:block;font-size:.8rem;color:var(--soft)}
.right img{outline:3px solid var(--right)}
.wrong img{outline:3px solid var(--wrong)}
.right figcaption,.wrong figcaption{margin-top:.5rem}
.right figcaption{color:var(--right)}
.wrong figcaption{color:var(--wrong)}
ul{margin:0 0 .9rem;padding-left:1.2rem}
summary{cursor:pointer;padding:.2rem 0}
pre{background:var(--wash);padding:.9rem 1rem;margin:.6rem 0 0;font-size:.82rem;line-height:1.45;white-space:pre-wrap}
footer{border-top:1px solid var(--line);margin-top:2.4rem;padding-top:.9rem;font-size:.85rem}
@media(max-width:40rem){
 body{padding:1.4rem 1rem 2rem}
 .fours{grid-template-columns:repeat(4,1fr)}
 h1{font-size:1.5rem}
 .headline dd{font-size:1.7rem}
 .headline{gap:.6rem 1.8rem}
 th,td{padding-right:.8rem}
 .cards,.cards tbody,.cards tr,.cards tbody th{display:block}
 .cards thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
 .cards tr{border-bottom:1px solid var(--line);padding:.55rem 0}
 .cards tbody th,.cards td{border:0;padding:.08rem 0;text-align:left}
 .cards td{display:flex;justify-content:space-between;gap:1rem;text-align:right}
 .cards td::before{content:attr(data-label);color:var(--soft);text-align:left;flex:none;max-width:55%}
}
@media print{section{break-inside:avoid}}
"""
