"""The frame of a page: HTML head and style by hand, light and dark, phone and paper; its parts."""

from __future__ import annotations

import base64
import json
import logging
import math
from html import escape
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6472; --ground: #fff;
  --card: #f5f6f8; --line: #dfe3e8; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaef; --soft: #a3acb9;
  --ground: #14171c; --card: #1e232b; --line: #333b47; --accent: #6db8ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 56rem; color: var(--ink);
  background: var(--ground); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.2rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.5rem 0 .75rem; }
p { margin: .25rem 0; }
.result { font-size: clamp(1.9rem, 7vw, 2.8rem); font-weight: 650; line-height: 1.2;
  margin: .5rem 0; color: var(--accent); font-variant-numeric: tabular-nums; }
.result span { font-size: 1rem; font-weight: 400; color: var(--soft); white-space: nowrap; }
.facts, figcaption { color: var(--soft); font-size: .875rem; overflow-wrap: anywhere; }
figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; background: #fff; padding: .5rem;
  border: 1px solid var(--line); border-radius: .5rem; }
img.pixels { padding: 0; image-rendering: pixelated; }
figcaption { margin-top: .35rem; }
pre { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; margin: .25rem 0 1rem;
  overflow-x: auto; font: .8125rem/1.5 ui-monospace, Consolas, monospace; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .75rem .4rem 0; white-space: nowrap;
  border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
th:last-child { text-align: left; }
td.name, table.named th:first-child { text-align: left; } td.name { white-space: normal; }
table.named th:last-child { text-align: right; }
td.text { text-align: left; white-space: normal; min-width: 18rem; }
@media (max-width: 40rem) { td.text { min-width: 36rem; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; } .scroll { overflow: visible; }
  th, td { white-space: normal; } td.text { min-width: 0; } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document that loads nothing and runs nothing.

    Args:
        title: Plain text.
        body: HTML, escaped by the caller.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # even an unescaped line could load or run nothing
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def picture(path: Path, alt: str) -> str:
    """The picture as HTML; nothing if it is no PNG, or cut short."""
    content = path.read_bytes() if path.is_file() else b""
    if not (content.startswith(PNG) and content.endswith(PNG_END)):
        return ""
    data = base64.b64encode(content).decode()
    kind = ' class="pixels"' if path.parent.name == "samples" else ""
    return (
        f'<figure><img{kind} src="data:image/png;base64,{data}" alt="{escape(alt)}">'
        f"<figcaption>{escape(alt)}</figcaption></figure>\n"
    )


def plain(text: str, kind: str = "plain") -> str:
    """A paragraph; nothing for no text."""
    return f'<p class="{kind}">{escape(text)}</p>\n' if text else ""


def load(path: Path, kind: type) -> Any:  # noqa: ANN401
    """The JSON in ``path`` if it is of ``kind``, else an empty one."""
    if not path.exists():
        return kind()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        log.warning("%s is no JSON; the report leaves it out.", path)
        return kind()
    return content if isinstance(content, kind) else kind()


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
