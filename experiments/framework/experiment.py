"""What an experiment is made of: its flags, the folder it writes to, and what it found.

An experiment is a module `experiments/NAME.py`, named in `launch.EXPERIMENTS`, with
- SUMMARY: one line for `--list`,
- Options: a frozen dataclass whose fields are made with `options.flag`; they become its absl flags,
- run(options, output) -> Outcome.
"""

import contextlib
import dataclasses
import fcntl
import os
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
    """An experiment's own folder, from `opened`. Where nothing is written, nothing is left."""

    folder: Path
    files: list[str] = dataclasses.field(default_factory=list)
    rows_file: Path | None = None  # of an experiment that can go on where it ended

    def path(self, name: str) -> Path:
        """Where to write a file or folder of that name; result.json will list it."""
        self.files.append(name)
        return self.folder / name

    def rows_path(self) -> Path:
        """Where rows are kept as they become known; the same command goes on from them."""
        self.rows_file = self.path("rows.jsonl")
        return self.rows_file

    @staticmethod
    @contextlib.contextmanager
    def opened(folder: Path) -> Iterator["Output"]:
        """The folder, made if need be, for one launch at a time.

        InputError where it can't be made or written to, or another launch has it. The kernel gives
        the lock back when the process ends, however it ends.
        """
        made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            _remove_empty(made)
            raise InputError(f"--output_dir: can't make {folder}: {error.strerror}") from error
        try:
            _lock(handle, folder)
            if (folder / "result.json").is_dir():
                raise InputError(f"--output_dir: {folder / 'result.json'} is a folder")
            try:
                yield Output(folder)
            finally:
                _remove_empty(made)
        finally:
            os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"--output_dir: another launch is writing to {folder}; wait for it, or name another one"
        ) from error
    except OSError as error:
        raise InputError(f"--output_dir: can't lock {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output_dir: {folder} can't be written to")


def _remove_empty(folders: list[Path]) -> None:
    """Removes those of the folders, innermost first, that hold nothing."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


@dataclasses.dataclass(frozen=True)
class Made:
    """When rows were made, for how long, on what: not this launch's where others made them."""

    started: str
    duration_s: float
    environment: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an experiment found. `passed` False makes the launcher exit with status 1.

    `rows` is its table, `summary` what it says in a sentence, `headline` what a reader should find
    at the top level of result.json. `made`: None where this launch made all rows.
    """

    passed: bool
    summary: str
    rows: list[Row]
    headline: dict[str, Any] = dataclasses.field(default_factory=dict)
    made: Made | None = None


class Experiment(Protocol):
    """The module of an experiment."""

    SUMMARY: str
    Options: type

    def run(self, options: Any, output: Output) -> Outcome: ...
