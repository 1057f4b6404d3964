"""The parts of an experiment: its flags, its output folder and its outcome.

An experiment is a module `experiments/FOLDER/NAME.py`, listed in `launch.FOLDERS`, with
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

Row = dict[str, Any]  # a str, int, float, bool or None per column


class InputError(Exception):
    """Raised for unusable input. The launcher prints it and exits with status 2."""


@contextlib.contextmanager
def reading(flag_name: str) -> Iterator[None]:
    """Turns errors of reading the input of a flag into an InputError that names the flag."""
    try:
        yield
    except (ValueError, OSError) as error:
        what: object = error
        if isinstance(error, OSError) and error.strerror:  # without "[Errno 2]"
            what = f"{error.filename}: {error.strerror}"
        raise InputError(f"--{flag_name}: {what}") from error


@dataclasses.dataclass
class Output:
    """The folder of an experiment, from `opened`. A folder without files is removed."""

    folder: Path
    files: list[str] = dataclasses.field(default_factory=list)
    rows_file: Path | None = None  # if the experiment can resume

    def path(self, name: str) -> Path:
        """Returns the path for a file or folder of that name, which result.json will list."""
        self.files.append(name)
        return self.folder / name

    def rows_path(self) -> Path:
        """Returns the path of the rows measured so far, from which the same command resumes."""
        self.rows_file = self.path("rows.jsonl")
        return self.rows_file

    @staticmethod
    @contextlib.contextmanager
    def opened(folder: Path) -> Iterator["Output"]:
        """Opens the folder for one launch at a time, and creates it if necessary.

        Raises InputError if it can't be created or written to, or if another launch uses it. The
        lock ends with the process, however that ends.
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
    """Removes the folders that are empty, from the innermost outwards."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


@dataclasses.dataclass(frozen=True)
class Made:
    """When rows were made, for how long and on which machine, if another launch made them."""

    started: str
    duration_s: float
    environment: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of an experiment. If `passed` is False, the launcher exits with status 1.

    `rows` is its table and `summary` its finding in a sentence. `headline` has the values that
    result.json shows at its top level. `made` is None if this launch made all rows.
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
