"""Pictures of the demo: the contact sheet (PNG) and the page (HTML, no script, pictures by relative path)."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont


STYLE = """
:root { color-scheme: light dark; --line: light-dark(#ddd8e8, #3a3547); --soft: light-dark(#6b6478, #a59db5);
  --card: light-dark(#ffffff, #211d2b); --accent: #7e57c2; }
* { box-sizing: border-box; }
body { margin: 0; background: light-dark(#f7f5fb, #16131d); color: light-dark(#221c30, #ece8f4);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; margin: 0 0 .25rem; letter-spacing: -.02em; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; }
p { margin: .25rem 0 .75rem; max-width: 60rem; }
.soft, figcaption small { color: var(--soft); }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: .85rem; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.base td { background: light-dark(#f1ecfa, #2a2438); }
figure { margin: 0 0 1rem; padding: .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
figure img { width: 100%; display: block; border-radius: .3rem; }
figcaption { display: flex; justify-content: space-between; gap: 1rem; padding-bottom: .5rem; flex-wrap: wrap; }
figcaption b { color: light-dark(#5e35b1, #b39ddb); }
ol { margin: 1.25rem 0 .75rem;
  columns: 2; column-gap: 2.5rem; font-size: .85rem; color: var(--soft); padding-left: 1.5rem; }
li { break-inside: avoid; }
code { background: light-dark(#ece7f5, #2c2639); padding: .1rem .35rem; border-radius: .25rem; font-size: .85em; }
@media (max-width: 40rem) { ol { columns: 1; } }
"""
COLUMNS = ("model", "method", "calls", "s/picture", "speed-up", "judge", "PSNR dB")


def cells(figures: dict[str, Any]) -> tuple[str, ...]:
    """Table cells of one finished row, in the order of `COLUMNS`."""
    number = lambda key, form: "-" if figures[key] is None else form.format(figures[key])  # noqa: E731
    return (
        figures["model"],
        figures["title"],
        str(figures["calls"]),
        number("seconds", "{:.2f}"),
        number("speedup", "{:.2f}x"),
        number("accuracy", "{:.0%}"),
        number("psnr", "{:.1f}"),
    )


def enlarged(image: Image.Image, factor: int) -> Image.Image:
    """A picture of few pixels, large enough to look at."""
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def contact_sheet(columns: Mapping[str, Sequence[tuple[str, str, Image.Image]]], scale: int = 2) -> Image.Image:
    """Pictures of several methods under each other, one column per model.

    Args:
        columns: Title of a column -> its rows (heading, remark, strip of pictures); strips are equally large.
        scale: Enlargement of the strips.
    """
    first = next(iter(columns.values()))[0][2]
    width, height, margin, band, gap = first.width * scale, first.height * scale, 28, 30, 12
    tallest = max(len(rows) for rows in columns.values())
    size = (margin + len(columns) * (width + margin), 2 * margin + 40 + tallest * (band + height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    big, font, small = (ImageFont.load_default(points) for points in (26, 19, 16))
    for index, (title, rows) in enumerate(columns.items()):
        x, y = margin + index * (width + margin), margin + 40
        draw.text((x, margin - 8), title, fill="#221c30", font=big)
        for heading, remark, strip in rows:
            draw.text((x, y), heading, fill="#5e35b1", font=font)
            draw.text((x + width, y + 3), remark, fill="#6b6478", font=small, anchor="ra")
            sheet.paste(enlarged(strip, scale), (x, y + band))
            y += band + height + gap
    return sheet


def text_table(results: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal."""
    lines = [COLUMNS, *(cells(figures) for figures in results)]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(COLUMNS))]
    padded = (
        [str(c).ljust(w) if i < 2 else str(c).rjust(w) for i, (c, w) in enumerate(zip(x, widths))] for x in lines
    )
    return "\n".join("  ".join(line) for line in padded)


def _table(results: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    lines = []
    for figures in results:
        mark = ' class="base"' if figures["baseline"] is None else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(figures)) + "</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _figure(figures: dict[str, Any]) -> str:
    remark = html.escape(remark_of(figures))
    return (
        f"<figure><figcaption><span><b>{html.escape(figures['title'])}</b> <small>{html.escape(figures['detail'])}"
        f"</small></span><small>{remark}</small></figcaption>"
        f'<img src="rows/{figures["row"]}-large.png" alt="{html.escape(figures["title"])}" loading="lazy"></figure>'
    )


def remark_of(figures: dict[str, Any]) -> str:
    """Short figures beside a strip of pictures."""
    *_, calls, seconds, speedup, judge, psnr = cells(figures)
    parts = [f"{calls} calls", f"{seconds} s", f"judge {judge}"]
    if figures["speedup"] is not None and figures["baseline"]:
        parts.insert(2, f"{speedup} faster" if figures["speedup"] >= 1 else speedup)
    if figures["psnr"] is not None:
        parts.append(f"{psnr} dB")
    return " · ".join(parts)


def write_page(path: Path, results: Sequence[dict[str, Any]], notes: Sequence[str]) -> None:
    """Write `index.html` for finished rows; pictures are read from `rows/` beside it."""
    sections = []
    for model in dict.fromkeys(figures["model"] for figures in results):
        mine = [figures for figures in results if figures["model"] == model]
        sections.append(f"<h2>{html.escape(model)}</h2>")
        for captions in dict.fromkeys(tuple(figures["captions"]) for figures in mine):
            items = "".join(f"<li>{html.escape(text)}</li>" for text in captions)
            shown = "".join(_figure(figures) for figures in mine if tuple(figures["captions"]) == captions)
            sections.append(f"<ol>{items}</ol>{shown}")
    intro = "".join(f"<p class='soft'>{html.escape(note)}</p>" for note in notes)
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>diffusers-ext demo</title><style>{STYLE}</style><main><h1>diffusers-ext</h1>"
        "<p>Papers as drop-in methods, drawn by the models that ship in the package: same captions, same start noise, "
        f"one method per row.</p>{_table(results)}{intro}{''.join(sections)}</main></html>\n",
        encoding="utf-8",
    )
