"""rows.jsonl: the rows that a benchmark has measured so far, from which it can resume.

A line is one of three things. A session describes a launch: machine, versions, ceilings and widths
of the cache. A row has the seconds since the start of its session. An end has the seconds that a
complete session took.
"""

import dataclasses
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

from experiments.framework.console import say
from experiments.framework.experiment import InputError, Made, Row
from experiments.framework.results import check_values, environment, plain, short, validate_session
from experiments.speed.shapes import Shape

STATUSES = ("measured", "failed", "skipped")

Key = tuple[Shape, str]


@dataclasses.dataclass
class Journal:
    """The sessions and rows of a rows.jsonl, to which each addition appends a line.

    The first addition is the first write to `path`. It also removes an incomplete last line.
    """

    path: Path
    sessions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: dict[Key, Row] = dataclasses.field(default_factory=dict)
    seconds: list[float] = dataclasses.field(default_factory=list)  # duration per session

    def __post_init__(self) -> None:
        self._whole: int | None = None  # bytes of the file to keep; None is all
        self._lead = b""  # written before the next line
        self._clock = time.monotonic()

    @staticmethod
    def open(path: Path, *, skipped: bool = False) -> "Journal":
        """Reads the lines of earlier launches.

        An incomplete last line is dropped. A damaged row is dropped with a message, and is run
        again. Any other damaged line may be a session, which later rows belong to, and raises
        InputError.

        skipped: whether to read skipped rows, which another run would try again.
        """
        journal = Journal(path)
        content = _read(path)
        *lines, rest = content.split(b"\n")
        if rest and _is_json(rest):  # only the line feed is missing
            lines.append(rest)
            journal._lead = b"\n"
        else:
            journal._whole = len(content) - len(rest)
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                journal._take(json.loads(line.decode("utf-8")), skipped)
            except (ValueError, RecursionError) as error:
                what = f"{path}, line {number}: {error}"
                if not line.startswith(b'{"row"'):
                    raise InputError(f"{what} (rows after it may be of a session in it)") from error
                say(f"left out and run again: {what}", style="red", stderr=True)
        return journal

    def begin(self, ceilings: dict[str, float], widths: tuple[int, int] | None = None) -> None:
        """Begins a session on this machine. widths: kv_lora_rank and rope_dim of its caches.

        Raises InputError if earlier sessions had other widths, because rows do not name them.
        """
        if widths is not None and self.widths not in (None, widths):
            raise InputError(
                f"--output_dir: the rows in {self.path} are of caches with (kv_lora_rank, rope_dim)"
                f" = {self.widths}, not {widths}; name another folder"
            )
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        session = {"started": now, "environment": environment(), "ceilings": ceilings}
        self.sessions.append(session | ({} if widths is None else {"widths": list(widths)}))
        self.seconds.append(0.0)
        self._append({"session": self.sessions[-1]})

    def add(self, row: Shape, name: str, status: str, **columns: Any) -> None:
        """Adds a row, which was measured, failed or skipped."""
        record = plain({
            **dataclasses.asdict(row), "implementation": name, "status": status,
            "session": len(self.sessions) - 1, **columns,
        })  # fmt: skip
        self._keep(record)
        self._append({"row": record, "at_s": self._elapsed()})

    def end(self) -> None:
        """Records that the session is complete."""
        self._append({"ended": len(self.sessions) - 1, "at_s": self._elapsed()})

    @property
    def widths(self) -> tuple[int, int] | None:
        """kv_lora_rank and rope_dim of the caches, or None if no session has them."""
        return next((tuple(s["widths"]) for s in self.sessions if "widths" in s), None)

    @property
    def made(self) -> Made | None:
        """When and on which machine the rows were made, and for how long; None without sessions."""
        if not self.sessions:
            return None
        started, last = self.sessions[0]["started"], self.sessions[-1]["environment"]
        return Made(started, sum(self.seconds), last)

    def _elapsed(self) -> float:
        """Returns the seconds since the journal was opened, and stores them for this session."""
        now = round(time.monotonic() - self._clock, 3)
        if self.seconds:
            self.seconds[-1] = now
        return now

    def _take(self, record: Any, skipped: bool) -> None:
        """Reads a line of the file. Raises ValueError if it is invalid."""
        if not isinstance(record, dict):
            raise ValueError(f"must be an object, got {short(record)}")
        if "session" in record:
            validate_session(record["session"], "session")
            self.sessions.append(record["session"])
            self.seconds.append(0.0)
            return
        session = record.get("ended")
        if "row" in record:
            check_row(record["row"], len(self.sessions))
            session = record["row"]["session"]
            if skipped or record["row"]["status"] != "skipped":
                self._keep(record["row"])
        elif type(session) is not int or not 0 <= session < len(self.sessions):
            raise ValueError(f"must be a session, a row or an end, got {short(record)}")
        at = record.get("at_s", 0.0)  # older files do not have it
        if type(at) is not float or not 0 <= at < float("inf"):
            raise ValueError(f"at_s must be seconds, got {short(at)}")
        self.seconds[session] = max(self.seconds[session], at)

    def _keep(self, record: Row) -> None:
        self.rows[Shape.of(record), record["implementation"]] = record

    def _append(self, record: dict[str, Any]) -> None:
        """Appends a line and flushes it to disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = self._lead + json.dumps(record, allow_nan=False).encode() + b"\n"
        with self.path.open("ab") as file:
            if self._whole is not None:
                file.truncate(self._whole)
            self._whole, self._lead = None, b""
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def check_row(row: Any, sessions: int | None) -> None:
    """Raises ValueError unless this is a row of a benchmark with that many sessions, if known."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, got {short(row)}")
    check_values(row, "row")
    Shape.of(row)
    if not isinstance(row.get("implementation"), str):
        raise ValueError(f"implementation must be a name, got {short(row.get('implementation'))}")
    status, session = row.get("status"), row.get("session")
    if status not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {short(status)}")
    if sessions is not None and (type(session) is not int or not 0 <= session < sessions):
        raise ValueError(f"session must be one of {sessions} before it, got {short(session)}")
    us = row.get("us")
    is_time = isinstance(us, int | float) and not isinstance(us, bool) and 0 < us < float("inf")
    if status == "measured" and not is_time:
        raise ValueError(f"us of a measured row must be a number above 0, got {short(us)}")
    if status != "measured" and not isinstance(row.get("reason"), str):
        raise ValueError(f"a {status} row must have a reason, got {short(row.get('reason'))}")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read(path: Path) -> bytes:
    """Returns the content of a file, empty if there is none. Raises InputError on other errors."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"--output_dir: {path} is not a file")
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError(f"--output_dir: {path}: {error.strerror}") from error
