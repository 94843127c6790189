"""Single-file HTML pages: text, tables and figures that need no other file and no network."""

import html
import re
from collections.abc import Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; } th:first-child, td:first-child { text-align: left; }
figure { margin: 1.2rem 0; } figure svg { max-width: 100%; height: auto; } figcaption { color: #555; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 13px; }
"""


def page(title: str, *parts: str) -> str:
    """A whole document. ``parts`` are HTML, made by the functions below."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            '<link rel="icon" href="data:,">',  # otherwise the browser asks the server for one
            f"<title>{html.escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            f"<h1>{html.escape(title)}</h1>",
            *parts,
            "</html>",
            "",
        ]
    )


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Cells are text and are escaped; the first column is left-aligned, numbers are right-aligned."""
    lines = ["<table>", "<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row of {len(row)} cells under {len(head)} names")
        lines.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def figure(svg: str, caption: str, *, name: str) -> str:
    """An SVG document within the page. ``name``, unique on the page, keeps the ids of figures apart."""
    start = svg.find("<svg")
    if start < 0:
        raise ValueError("this is not an SVG document")
    inner = re.sub(r"<metadata>.*?</metadata>", "", svg[start:], flags=re.DOTALL)
    inner = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", inner)  # not needed in HTML
    for pattern in (r'(\bid=")', r'(href="#)', r"(url\(#)"):
        inner = re.sub(pattern, rf"\g<1>{name}-", inner)
    return f"<figure>\n{inner}\n<figcaption>{html.escape(caption)}</figcaption>\n</figure>"
