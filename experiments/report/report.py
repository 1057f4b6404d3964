"""Makes one HTML page of all results in a folder, which needs no other file and no network.

    python -m experiments.launch --experiment=report --results=out --output_dir=out

It includes every result.json under the folder, from any experiment, and the pictures in the same
folder. A result that can't be shown is left out and listed. Nothing outside the folder is read.
docs/reading_the_report.md explains the page.
"""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.framework.console import say
from experiments.framework.experiment import InputError, Outcome, Output, Row
from experiments.framework.journal import check_row
from experiments.framework.options import flag
from experiments.framework.results import SCHEMA, validate_result, write_whole
from experiments.report import page
from experiments.speed.benchmark_tables import COLUMNS
from experiments.speed.best_when import AXES, best_when

SUMMARY = "one HTML page of all results in a folder: tables, pictures, what is best when"

GROUPS = {  # in the order of the page, which ends with the results in none of them
    "Speed": (
        *("benchmark", "kernel_bench", "prefill", "sharded", "layer_step", "choices", "generate"),
        "calibrate",
    ),
    "Accuracy": ("demo", "correctness", "parity", "soak", "int8_accuracy", "amla_accuracy"),
    "Machines": ("pipeline", "compare", "sweep", "best", "published"),
    "Sizes and plans": ("cache_size", "split_kv"),
}
GRID = ("benchmark", "kernel_bench")  # whose rows are shapes and implementations
OTHER = "Other"
BEST = "What is best when"
RAN = "What ran"
LEFT_OUT = "Left out"
LARGEST = 64 << 20  # bytes per result.json or picture
NOT_MEASURED = ("failed", "skipped")
CEILING_SHARES = ("of_read", "of_matmul", "of_ceiling")
FEW = 8  # named numbers up to which they are written as a sentence


@dataclasses.dataclass(frozen=True)
class Options:
    results: str = flag("out", "a folder with results")


@dataclasses.dataclass(frozen=True)
class Result:
    """A result.json with its name on the page and the content of its pictures, by file name."""

    name: str
    content: dict[str, Any]
    pictures: dict[str, bytes]

    @property
    def anchor(self) -> str:
        """The id of the result's element on the page."""
        return "r-" + "".join(c if c.isalnum() else "-" for c in self.name)

    @property
    def group(self) -> str:
        """The group of the page that the result belongs to."""
        experiment = self.content["experiment"]
        return next((g for g, members in GROUPS.items() if experiment in members), OTHER)

    @property
    def environments(self) -> list[dict[str, Any]]:
        """The environments in which it ran; a benchmark has one per session."""
        sessions = [s["environment"] for s in self.content.get("sessions", [])]
        return sessions or [self.content["environment"]]

    @property
    def where(self) -> str:
        """The devices on which it ran."""
        return ", ".join(dict.fromkeys(_devices(e) for e in self.environments))


def run(options: Options, output: Output) -> Outcome:
    if not options.results.strip():
        raise InputError("--results must name a folder, got an empty name")
    folder, left_out = Path(options.results), list[Row]()
    results = read_results(folder, left_out)
    for row in left_out:
        say(f"left out: {row['file']}: {row['reason']}", style="red", stderr=True)
    html = render(results, page.printable(folder.resolve().name), left_out)
    path = output.path("report.html")
    write_whole(path, html)
    rows: list[Row] = [
        {"name": r.name, "experiment": r.content["experiment"], "passed": r.content["passed"]}
        for r in results
    ]
    size = len(html.encode()) / 2**20
    omitted = f", {len(left_out)} left out" if left_out else ""
    summary = f"{len(results)} results{omitted}, {size:.1f} MiB: {path}"
    return Outcome(True, summary, rows, {"left_out": left_out})


def read_results(folder: Path, left_out: list[Row] | None = None) -> list[Result]:
    """Reads every result under the folder except reports. Raises InputError if there is none.

    left_out: gets a row per file that can't be shown, with the reason.
    """
    found: list[Result] = []
    refused: list[Row] = [] if left_out is None else left_out
    for path in sorted(folder.rglob("result.json")):
        try:
            result = _read(path, folder)
            if result.content["experiment"] != "report":
                render([result], "")  # raises here for a result that a page can't show
                found.append(result)
        except Exception as error:
            reason = str(error) or type(error).__name__
            if not isinstance(error, ValueError | OSError):
                reason = f"{type(error).__name__}: {error}"
            refused.append(
                {"file": page.printable(str(path)), "reason": page.printable(reason)[:500]}
            )
    if not found:
        reasons = "; ".join(f"{row['file']}: {row['reason']}" for row in refused)
        where = page.printable(str(folder))
        raise InputError(f"--results: no result.json under {where}{reasons and f', but {reasons}'}")
    return found


def _read(path: Path, folder: Path) -> Result:
    """Reads a result. Raises ValueError or OSError if it can't be shown."""
    content = json.loads(_content(path, folder).decode("utf-8"), parse_constant=_no_number)
    if not isinstance(content, dict):
        raise ValueError("must hold an object")
    validate_result(content)
    for i, row in enumerate(content["rows"]) if content["experiment"] in GRID else ():
        try:
            check_row(row, len(content["sessions"]) if "sessions" in content else None)
        except ValueError as error:
            raise ValueError(f"rows[{i}]: {error}") from error
    content["rows"] = [_without_wrong_shares(row) for row in content["rows"]]
    missing = [name for name in pictures(content) if not (path.parent / name).is_file()]
    if missing:
        raise ValueError(f"names pictures that are not there: {', '.join(missing)}")
    read = {name: _content(path.parent / name, path.parent) for name in pictures(content)}
    name = path.parent.relative_to(folder).as_posix()
    name = content["experiment"] if name == "." else page.printable(name)
    return Result(name, content, read)


def _without_wrong_shares(row: Row) -> Row:
    """Removes the shares of a ceiling from a row if one exceeds 1.

    Older results measured the ceiling by XLA alone, and also on a CPU, which has none.
    """
    shares = [row.get(key) for key in CEILING_SHARES]
    if any(isinstance(share, float) and share > 1 for share in shares):
        return {key: value for key, value in row.items() if key not in CEILING_SHARES}
    return row


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _content(path: Path, folder: Path) -> bytes:
    """Reads a file. Raises ValueError if it is none, is outside the folder, or is too large."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} leads out of {folder}")
    if not path.is_file():
        raise ValueError("is not a file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has more than {LARGEST >> 20} MiB")
    return path.read_bytes()


def pictures(content: dict[str, Any]) -> list[str]:
    """Returns the names of a result's pictures. Raises ValueError for one outside its folder."""
    for name in content["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise ValueError(f"names a file outside its folder: {name}")
    return [name for name in content["files"] if Path(name).suffix in page.PICTURES]


def render(results: Sequence[Result], title: str, left_out: Sequence[Row] = ()) -> str:
    """Returns the page."""
    sections = {RAN: ran(results), BEST: best(results), "Errors against float64": accuracy(results)}
    for group in (*GROUPS, OTHER):
        sections[group] = "".join(article(r) for r in results if r.group == group)
    sections[LEFT_OUT] = page.table(left_out)
    sections = {heading: content for heading, content in sections.items() if content}
    ids = {heading: heading.lower().replace(" ", "-") for heading in sections}
    links = "".join(f'<a href="#{ids[h]}">{page.text(h)}</a>' for h in sections)
    passed = sum(r.content["passed"] for r in results)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = "\n".join(
        f'<section id="{ids[heading]}"><h2>{page.text(heading)}</h2>\n{content}</section>'
        for heading, content in sections.items()
    )
    return page.document(
        f"mla-jax: {title}",
        f"<header><h1>mla-jax, results in {page.text(title)}</h1>\n"
        f'<p class="soft">{len(results)} result{"s" * (len(results) != 1)}, {passed} passed; on '
        f"{page.text(', '.join(dict.fromkeys(r.where for r in results)))}.</p>\n"
        f"<nav>{links}</nav></header>\n<main>\n{body}\n</main>\n"
        f"<footer>Written {now} by experiments.report.</footer>",
    )


def ran(results: Sequence[Result]) -> str:
    """Returns what ran on which machine, with which versions."""
    lines = [
        {
            "result": page.Link(r.name, r.anchor),
            "verdict": "passed" if r.content["passed"] else "FAILED",
            "finding": r.content["summary"],
            "where": r.where,
            "started, UTC": r.content["started"][:16].replace("T", " "),
            "seconds": r.content["duration_s"],
            "jax": ", ".join(dict.fromkeys(e["versions"].get("jax", "") for e in r.environments)),
        }
        for r in results
    ]
    machines: dict[str, Row] = {}
    for environment in (e for r in results for e in r.environments):
        machine = {
            "device": _devices(environment),
            "backend": environment["backend"],
            "machine": environment["machine"],
            "CPU cores": environment["cpu_count"],
            **environment["versions"],
        }
        machines[json.dumps(machine)] = machine
    return page.table(lines) + "<h4>Machines and versions</h4>\n" + page.table(machines.values())


def best(results: Sequence[Result]) -> str:
    """Returns a table per benchmarked device: the fastest implementation per class of shapes."""
    devices: dict[str, list[Row]] = {}
    for result in results:
        if result.content["experiment"] == "benchmark":
            for row in result.content["rows"]:
                devices.setdefault(str(row.get("device", "")), []).append(row)
    tables = {device: page.table(best_when(rows)) for device, rows in devices.items()}
    about = (
        "<p>Shapes in classes. A ratio is the time of the baseline over our time, so that above 1 "
        "ours is faster: the geometric mean, then least and largest. The time of a peer, another "
        "library, is the best of those that ran here and of the published and measured ones in "
        "benchmarks/. Of the ceiling: the larger share of the highest read bandwidth and matmul "
        "rate that anything reached in the session.</p>\n"
    )
    content = "".join(f"<h4>{page.text(d)}</h4>\n{t}" for d, t in tables.items() if t)
    return about + content if content else ""


def accuracy(results: Sequence[Result]) -> str:
    """Returns the largest and median error of each error column, by result."""
    lines: list[Row] = []
    for result in results:
        rows = result.content["rows"]
        columns = dict.fromkeys(c for row in rows for c in row if "error" in c.split("_"))
        link = page.Link(result.name, result.anchor)
        for column in columns:
            values = [row[column] for row in rows if isinstance(row.get(column), float)]
            if values and "percent" not in column:
                worst = next(row for row in rows if row.get(column) == max(values))
                lines.append({"result": link, "error of": column.replace("_", " "),
                              "largest": max(values), "median": sorted(values)[len(values) // 2],
                              "rows": len(values), "largest in": label(worst)})  # fmt: skip
    return page.table(lines)


def label(row: Row) -> str:
    """Returns a short name of a row, from its text and whole numbers."""
    values = [row[axis] for axis in AXES] if all(axis in row for axis in AXES) else []
    if values:
        batch, dtype, heads, s_q, size, lengths, kv_len = values
        words = [f"{heads} heads, S_q {s_q}, {batch} x {kv_len} {lengths}, page {size}, {dtype}"]
        return ", ".join([*words, str(row.get("implementation", ""))])
    return ", ".join(str(value) for value in row.values() if isinstance(value, str) and value)[:80]


def article(result: Result) -> str:
    """Returns all of one result: verdict, pictures, tables, and its flags folded."""
    content = result.content
    verdict = "passed" if content["passed"] else "failed"
    parts = [
        f'<article id="{result.anchor}"><div class="title"><h3>{page.text(result.name)}</h3>'
        f'<span class="{verdict}">{verdict}</span><span class="soft">{page.text(result.where)}, '
        f"{page.text(content['started'][:10])}</span></div>\n<p>{page.text(content['summary'])}</p>\n"
    ]
    extra = {k: v for k, v in content.items() if k not in SCHEMA and k != "sessions"}
    parts.append(page.pairs({k: v for k, v in extra.items() if not isinstance(v, list | dict)}))
    parts += [_nested(name.replace("_", " "), value) for name, value in extra.items() if value]
    for name, picture in result.pictures.items():
        suffix = Path(name).suffix
        parts.append(page.picture(picture, suffix, f"{content['experiment']}: {name}"))
    parts.append(rows_of(content))
    if "sessions" in content:
        ceilings = [{"started": s["started"], "device": _devices(s["environment"]), **s["ceilings"]}
                    for s in content["sessions"] if s["ceilings"]]  # fmt: skip
        heading = "<h4>Rates of XLA, measured in the same session (GB/s, TFLOPS)</h4>\n"
        parts.append(heading + page.table(ceilings) if ceilings else "")
    options = {k: v for k, v in content["options"].items() if v not in (None, [], "")}
    parts.append(page.folded("Flags", page.pairs(options)))
    return "".join(parts) + "</article>\n"


def rows_of(content: dict[str, Any]) -> str:
    """Returns the table of a result; for a benchmark its main columns and why rows are missing."""
    rows = content["rows"]
    if not rows:
        return ""
    if content["experiment"] not in GRID:
        return f"<h4>Rows</h4>\n{page.table(rows)}"
    columns = {axis: axis.replace("_", " ") for axis in AXES} | COLUMNS
    parts = [
        "<h4>Measured</h4>\n",
        page.table([row for row in rows if row["status"] == "measured"], columns),
    ]
    for status in NOT_MEASURED:
        reasons: dict[tuple[str, str], int] = {}
        for row in rows:
            if row["status"] == status:
                key = row["implementation"], row["reason"]
                reasons[key] = reasons.get(key, 0) + 1
        lines = [{"who": w, "rows": n, "reason": r} for (w, r), n in reasons.items()]
        parts.append(page.folded(f"{sum(reasons.values())} {status}", page.table(lines)))
    return "".join(parts)


def _nested(name: str, value: Any) -> str:
    """Returns a value that an experiment adds at the top level: rows, lines, or named numbers."""
    heading = f"<h4>{page.text(name)}</h4>\n"
    if isinstance(value, list):
        if all(isinstance(item, dict) for item in value):
            return heading + page.table(value)
        if all(isinstance(item, str) for item in value):
            return heading + page.listing(value)
        return page.pairs({name: ", ".join(map(page.words, value))})
    if not isinstance(value, dict):
        return ""  # scalars are shown in front
    if any(isinstance(item, dict) for item in value.values()):
        rows = [item if isinstance(item, dict) else {"value": item} for item in value.values()]
        return heading + page.table(
            {"name": key, **row} for key, row in zip(value, rows, strict=True)
        )
    if len(value) > FEW:
        return heading + page.table({"name": key, "value": item} for key, item in value.items())
    words = ", ".join(f"{key.replace('_', ' ')} {page.words(item)}" for key, item in value.items())
    return page.pairs({name: words})


def _devices(environment: dict[str, Any]) -> str:
    """Returns the devices in words, such as "2 x NVIDIA H200"."""
    kinds = environment["devices"]
    return ", ".join(
        f"{kinds.count(kind)} x {kind}" if kinds.count(kind) > 1 else kind
        for kind in dict.fromkeys(kinds)
    )
