"""Prints progress and tables, as plain lines if the output is not a terminal."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, NoReturn

import rich.box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_PLAIN_WIDTH = 120  # columns of a table in a file or a pipe
_PLAIN_INTERVAL = 5.0  # seconds between two lines of progress in a file or a pipe


def say(message: str, *, style: str | None = None, stderr: bool = False) -> None:
    """Prints a line unchanged, with escapes for characters that the output's encoding lacks."""
    console = _console(stderr)
    printable = message.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(printable, style=style, markup=False, highlight=False, soft_wrap=True)


def track[T](items: Iterable[T], label: str, *, total: int | None = None) -> Iterator[T]:
    """Yields the items and shows the progress. Items without a length need `total`."""
    count = len(items) if isinstance(items, Sized) else total
    if count is None:
        raise TypeError(f"{label}: items without a length need a total")
    if _console().is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=_console()) as progress:
            yield from progress.track(items, total=count, description=label)
        return
    start = shown = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - shown > _PLAIN_INTERVAL:
            shown = time.monotonic()
            say(f"{label}: {done} of {count}, {shown - start:.0f} s")
        yield item


def show_table(
    title: str, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None
) -> None:
    """Prints rows as a table.

    columns: keys to show, in order, with their headers. None shows the keys of the first row.
    """
    rows = list(rows)
    if columns is None:
        columns = {key: key.replace("_", " ") for key in (rows[0] if rows else ())}
    table = Table(box=rich.box.SIMPLE_HEAD)
    for i, (key, header) in enumerate(columns.items()):
        numeric = any(isinstance(row.get(key), int | float) for row in rows)
        table.add_column(header, justify="right" if numeric else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    say(title, style="bold")
    _console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """Raises BrokenPipeError; rich would exit with 1, which means a failed experiment."""
        # Python flushes its buffer at the end and would report the broken pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        raise BrokenPipeError("nobody reads the output any more")


def _console(stderr: bool = False) -> Console:
    console = _Console(stderr=stderr)
    return console if console.is_terminal else _Console(stderr=stderr, width=_PLAIN_WIDTH)
