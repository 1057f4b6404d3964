"""What an experiment is made of: its flags, the folder it writes to, and what it found.

An experiment is a module `experiments/NAME.py`, named in `launch.EXPERIMENTS`, with
- SUMMARY: one line for `--list`,
- Options: a frozen dataclass whose fields are made with `options.flag`; they become its absl flags,
- run(options, output) -> Outcome.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]  # str, int, float, bool or None by column


class InputError(Exception):
    """What the user gave can't be used. The launcher prints it and exits with status 2."""


@contextlib.contextmanager
def reading(flag_name: str) -> Iterator[None]:
    """Turns what reading the input of a flag raises into an InputError that names the flag."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(f"--{flag_name}: {error}") from error


@dataclasses.dataclass
class Output:
    """An experiment's own folder; it appears with the first file, so an error leaves nothing."""

    folder: Path
    files: list[str] = dataclasses.field(default_factory=list)

    def path(self, name: str) -> Path:
        """Where to write a file or folder of that name; result.json will list it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files.append(name)
        return self.folder / name


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an experiment found. `passed` False makes the launcher exit with status 1.

    `rows` is its table, `summary` what it says in a sentence, `headline` what a reader should find
    at the top level of result.json.
    """

    passed: bool
    summary: str
    rows: list[Row]
    headline: dict[str, Any] = dataclasses.field(default_factory=dict)


class Experiment(Protocol):
    """The module of an experiment."""

    SUMMARY: str
    Options: type

    def run(self, options: Any, output: Output) -> Outcome: ...
