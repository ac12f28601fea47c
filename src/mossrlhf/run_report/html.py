"""Pieces of an HTML page; every text that comes from elsewhere is escaped on its way in."""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
"""What a browser may load for the page, by its Content-Security-Policy: nothing from elsewhere."""

STYLE = """
:root { color: #222; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; }
h1 { font-size: 1.7rem; margin: .5rem 0; }
h2 { border-bottom: 1px solid #ddd; font-size: 1.3rem; margin-top: 2.2rem; }
h3 { font-size: 1.05rem; margin-bottom: .4rem; }
img { height: auto; max-width: 100%; min-width: 44rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.warn, .fine { border-left: 4px solid; margin: .4rem 0; padding: .4rem .8rem; }
.warn { background: #fff4e5; border-color: #d55e00; }
.fine { background: #eaf6f1; border-color: #009e73; }
.note { color: #555; }
.wide { margin-bottom: .8rem; overflow-x: auto; }
.side { display: grid; gap: .8rem; grid-auto-columns: minmax(15rem, 1fr); grid-auto-flow: column; }
@media (max-width: 45rem) { .side { grid-auto-columns: auto; grid-auto-flow: row; } }
.card { background: #f7f7f7; border-radius: 6px; padding: .5rem .7rem; }
.card h4 { color: #555; font-size: .85rem; margin: 0 0 .3rem; }
pre { font: inherit; margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.prompt { background: none; border-left: 3px solid #ccc; margin: 1.2rem 0 .5rem;
  padding-left: .7rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #e4e4e4; overflow-wrap: anywhere; padding: .2rem .8rem .2rem 0;
  text-align: left; vertical-align: top; }
"""


def escaped(text: Any) -> str:
    """Return a text that no browser takes for anything else.

    Args:
        text: anything; what is no text is turned into one.

    Source: ours.
    """
    # A lone half of a surrogate pair, as JSON may hold it, is no character that could be written.
    safe = str(text).encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")
    return html.escape(safe, quote=True)


def picture(png: bytes, shows: str) -> str:
    """Return an image with its bytes in it.

    Args:
        png: the bytes.
        shows: said where it cannot be seen.

    Source: ours.
    """
    data = base64.b64encode(png).decode("ascii")
    image = f'<img alt="{escaped(shows)}" src="data:image/png;base64,{data}">'
    return f'<div class="wide">{image}</div>'


def paragraphs(kind: str, texts: Iterable[str]) -> str:
    """Return a paragraph for each text.

    Args:
        kind: class of their style.
        texts: plain.

    Source: ours.
    """
    return "\n".join(f'<p class="{kind}">{escaped(text)}</p>' for text in texts)


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; numbers are shortened.

    Args:
        heads: of the columns.
        rows: a cell for each.

    Source: ours.
    """
    lines = ["<tr>" + "".join(f"<th>{escaped(head)}</th>" for head in heads) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{escaped(_cell(cell))}</td>" for cell in row) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else value


def flat(values: Mapping[str, Any], within: str = "") -> list[tuple[str, Any]]:
    """Return pairs of name and value, those of dictionaries inside with a dotted name.

    Args:
        values: by name.
        within: the name of these, where they are inside of others.

    Source: ours.
    """
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{within}.{key}" if within else str(key)
        found += flat(value, name) if isinstance(value, Mapping) else [(name, value)]
    return found


def cards(columns: Mapping[str, str]) -> str:
    """Return texts side by side, each beneath its name.

    Args:
        columns: a text by name; both plain.

    Source: ours.
    """
    found = (
        f'<div class="card"><h4>{escaped(name)}</h4><pre dir="auto">{escaped(text)}</pre></div>'
        for name, text in columns.items()
    )
    return '<div class="wide"><div class="side">' + "".join(found) + "</div></div>"


def quoted(text: str) -> str:
    """Return a prompt, set off.

    Args:
        text: plain.

    Source: ours.
    """
    return f'<pre class="prompt" dir="auto">{escaped(text)}</pre>'


def section(key: str, title: str, *parts: str) -> str:
    """Return a section of the page.

    Args:
        key: its anchor.
        title: its heading, plain.
        parts: HTML.

    Source: ours.
    """
    return "\n".join(
        [f'<section id="{escaped(key)}">', f"<h2>{escaped(title)}</h2>", *parts, "</section>"]
    )


def whole_page(title: str, lead: str, sections: Mapping[str, str], version: str) -> str:
    """Return the page.

    Args:
        title: plain.
        lead: HTML beneath the title.
        sections: HTML of each by the name it has among the links at the top.
        version: of this library.

    Source: ours.
    """
    links = (f'<a href="#{key}">{escaped(key)}</a>' for key in sections)
    return "\n".join([
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{escaped(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{escaped(title)}</h1>",
        lead,
        f"<nav>{''.join(links)}</nav>",
        *sections.values(),
        f'<p class="note">Made by mossrlhf {escaped(version)} from the run\'s folder alone.</p>',
        "</body>",
        "</html>",
        "",
    ])  # fmt: skip
