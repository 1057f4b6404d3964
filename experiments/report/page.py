"""HTML in one file: tables that sort, pictures inlined, nothing fetched. Text is always escaped."""

import base64
import dataclasses
import html
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MANY_ROWS = 12  # from which a table gets a field that filters it
PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"IEND"

_HERE = Path(__file__).parent
# The browser itself is told to fetch nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Link:
    """Words that lead to an element of the page."""

    words: str
    anchor: str

    def __str__(self) -> str:
        return self.words


def document(title: str, body: str) -> str:
    """The page: light and dark by the reader's setting, for a phone and a desk."""
    style, script = ((_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """A value in words, escaped: numbers short, None empty."""
    if isinstance(value, Link):
        return f'<a href="#{html.escape(value.anchor)}">{html.escape(value.words)}</a>'
    return html.escape(words(value))


def words(value: Any) -> str:
    """A value in words, not escaped yet."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else str(value)


def printable(name: str) -> str:
    """The name of a file or folder, whatever bytes it has, as text that can be written."""
    return name.encode("utf-8", "backslashreplace").decode()


def number(value: float) -> str:
    """Three or four digits that count."""
    size = abs(value)
    if value == 0 or (value.is_integer() and size < 1e4):
        return f"{value:,.0f}"
    if size < 1e-2 or size >= 1e7:
        return f"{value:.1e}"
    return f"{value:,.0f}" if size >= 1e3 else f"{value:.4g}" if size >= 100 else f"{value:.3g}"


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> str:
    """Rows by `columns` (key: header), or by all keys; columns that hold nothing are left out.

    Where three rows or more agree in a column, it is said once, in front.
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
    said = ""
    if alike and shown is not used:
        words = (f"{text(header)} {text(rows[0][key])}" for key, header in alike.items())
        said = f'<p class="soft">In all {len(rows)} rows: {"; ".join(words)}.</p>\n'
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
        f'{said}{search}<div class="scroll" tabindex="0"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>\n"
    )


def pairs(values: Mapping[str, Any]) -> str:
    """Scalars by name, as a sentence of a kind."""
    words = [f"{text(k.replace('_', ' '))}: <b>{text(v)}</b>" for k, v in values.items()]
    return f"<p>{' &middot; '.join(words)}</p>\n" if words else ""


def picture(content: bytes, suffix: str, caption: str) -> str:
    """The content of a picture file, inlined. ValueError where it is not of the suffix's kind."""
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
    """A list."""
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>\n"


def folded(label: str, content: str) -> str:
    """What opens by a click."""
    return f"<details><summary>{text(label)}</summary>\n{content}</details>\n" if content else ""


def _is_wide(content: bytes) -> bool:
    """Whether this is a PNG more than twice as wide as high: a phone shows it by scrolling."""
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
