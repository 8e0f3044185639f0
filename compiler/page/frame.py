"""The HTML around every page of llmc: one file, no script, nothing loaded, light or dark as the reader's
system says."""

from __future__ import annotations

from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --paper: #ffffff; --soft: #5b6475; --line: #d9dde5;
  --panel: #f5f6f9; --accent: #2563eb; --second: #d97706; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --paper: #14171d; --soft: #9aa3b4;
  --line: #2c323d; --panel: #1c2028; --accent: #7aa2ff; --second: #f0a94b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 66rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } .lead { font-size: 1.1rem; }
small { display: block; color: var(--soft); font-size: .78em; } p { margin: .5rem 0; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; width: 100%; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
tr:first-child th:not(:only-of-type) { color: var(--soft); font-weight: 500; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  white-space: normal; overflow-wrap: anywhere; min-width: 6rem; max-width: 10rem; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
blockquote { margin: .5rem 0; padding: .6rem .8rem; background: var(--panel); border-radius: .5rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; max-width: 31rem; margin: .4rem 0 1rem; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .soft { fill: var(--soft); }
svg .axis { stroke: var(--line); } svg .a { fill: var(--accent); } svg .b { fill: var(--second); }
svg .curve { fill: none; stroke-width: 2; } svg .c0 { stroke: var(--accent); }
svg .c1 { stroke: var(--second); } svg .c2 { stroke: #0d9488; } svg .c3 { stroke: #c026d3; }
svg .c4 { stroke: #dc2626; } svg .c5 { stroke: #65a30d; }
svg .front { stroke: var(--accent); fill: none; stroke-dasharray: 4 4; }
"""


def document(title: str, body: str) -> str:
    """A whole page. `body` is HTML, `title` text."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A part of a page under a heading."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def facts_table(rows: list[tuple[str, str]]) -> str:
    """Names and texts in two columns."""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<div class='scroll facts'><table>{body}</table></div>"


def wide_table(header: list[str], rows: list[list[str]]) -> str:
    """A table of texts with a header."""
    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(text)}</td>' for text in row[1:])}</tr>"
        for row in rows
    )
    return f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"
