"""Builds an HTML page in one file: sortable tables and inlined pictures. All text is escaped."""

import base64
import dataclasses
import html
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MANY_ROWS = 12  # a table with so many rows gets a filter field
PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"IEND"

_HERE = Path(__file__).parent
# This policy keeps the browser from fetching anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Link:
    """Text that links to an element of the page."""

    words: str
    anchor: str

    def __str__(self) -> str:
        return self.words


def document(title: str, body: str) -> str:
    """Returns the page, which follows the reader's light or dark setting and fits a phone."""
    style, script = ((_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """Returns a value as escaped text: numbers shortened, None empty."""
    if isinstance(value, Link):
        return f'<a href="#{html.escape(value.anchor)}">{html.escape(value.words)}</a>'
    return html.escape(words(value))


def words(value: Any) -> str:
    """Returns a value as text that is not escaped yet."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else str(value)


def printable(name: str) -> str:
    """Returns the name of a file or folder as valid text, whatever bytes it has."""
    return name.encode("utf-8", "backslashreplace").decode()


def number(value: float) -> str:
    """Returns a number with three or four significant digits."""
    size = abs(value)
    if value == 0 or (value.is_integer() and size < 1e4):
        return f"{value:,.0f}"
    if size < 1e-2 or size >= 1e7:
        return f"{value:.1e}"
    return f"{value:,.0f}" if size >= 1e3 else f"{value:.4g}" if size >= 100 else f"{value:.3g}"


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> str:
    """Returns a table of rows with the given columns (key: header), or with all keys.

    Empty columns are left out. A column in which three or more rows all agree becomes a sentence in
    front of the table.
    """
    rows = list(rows)
    if not rows:
        return ""
    if columns is None:
        columns = {key: key.replace("_", " ") for row in rows for key in row}
    used = {k: v for k, v in columns.items() if any(row.get(k) not in (None, "") for row in rows)}
    alike = {
        key: header
        for key, header in used.items()
        if len(rows) > 2 and all(row.get(key) == rows[0].get(key) for row in rows)
    }
    shown = {key: header for key, header in used.items() if key not in alike} or used
    common = ""
    if alike and shown is not used:
        words = (f"{text(header)} {text(rows[0][key])}" for key, header in alike.items())
        common = f'<p class="soft">In all {len(rows)} rows: {"; ".join(words)}.</p>\n'
    numeric = {key for key in shown if all(_is_number(row.get(key)) for row in rows)}
    heads = "".join(
        f'<th scope="col"{" class=number" if key in numeric else ""}>'
        f'<button type="button">{text(header)}</button></th>'
        for key, header in shown.items()
    )
    kinds = {key: "number" if key in numeric else _kind(rows, key) for key in shown}
    lines = "\n".join(
        f"<tr>{''.join(_cell(row.get(key), kinds[key]) for key in shown)}</tr>" for row in rows
    )
    search = (
        '<input class="filter" type="search" placeholder="Filter rows" aria-label="Filter rows" '
        "hidden>\n"
        if len(rows) >= MANY_ROWS
        else ""
    )
    return (
        f'{common}{search}<div class="scroll" tabindex="0"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{lines}\n</tbody></table></div>\n"
    )


def pairs(values: Mapping[str, Any]) -> str:
    """Returns scalars by name as a paragraph."""
    words = [f"{text(k.replace('_', ' '))}: <b>{text(v)}</b>" for k, v in values.items()]
    return f"<p>{' &middot; '.join(words)}</p>\n" if words else ""


def picture(content: bytes, suffix: str, caption: str) -> str:
    """Returns an inlined picture. Raises ValueError if the content does not match the suffix."""
    if suffix == ".png" and not (content.startswith(PNG_START) and PNG_END in content[-12:]):
        raise ValueError(f"{caption} is not a whole PNG")
    if suffix == ".svg" and b"<svg" not in content:
        raise ValueError(f"{caption} is not an SVG")
    kind, data = PICTURES[suffix], base64.b64encode(content).decode()
    wide = ' class="wide"' if _is_wide(content) else ""
    return (
        f'<figure><div class="picture" tabindex="0"><img{wide} alt="{text(caption)}" '
        f'src="data:{kind};base64,{data}"></div><figcaption>{text(caption)}</figcaption></figure>\n'
    )


def listing(lines: Sequence[Any]) -> str:
    """Returns a list."""
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>\n"


def folded(label: str, content: str) -> str:
    """Returns a section that opens by a click, or "" if it would be empty."""
    return f"<details><summary>{text(label)}</summary>\n{content}</details>\n" if content else ""


def _is_wide(content: bytes) -> bool:
    """Returns whether a PNG is more than twice as wide as high, so that a phone scrolls it."""
    if not content.startswith(PNG_START):
        return False
    width, height = struct.unpack(">II", content[16:24])
    return width > 2 * height


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _kind(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    longest = max(len(str(row.get(key) or "")) for row in rows)
    return "word" if longest <= 20 else "text" if longest <= 60 else "text long"


def _cell(value: Any, kind: str) -> str:
    if kind != "number":
        return f'<td class="{kind}">{text(value)}</td>'
    data = "" if value is None else f' data-v="{value!r}"'
    return f'<td class="number"{data}>{text(value)}</td>'
