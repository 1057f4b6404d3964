"""The tables of benchmarks/predictions.md, from the files of experiments.simulated.foretell."""

from pathlib import Path

from tables_common import read, table, wrapped

from experiments.simulated.foretell import score


def predicted(root: Path) -> str:
    """Returns each date's table: the bound of a device, and the kernels that were simulated."""
    paths = sorted((root / "benchmarks" / "predictions").glob("*.json"))
    return "\n\n".join(_of_date(read(path)) for path in paths)


def _of_date(found: dict) -> str:
    calls: dict[tuple, dict[str, float]] = {}
    for row in found["rows"]:
        call = (row["device"], row["heads"], row["batch"], row["kv_len"])
        calls.setdefault(call, {})[row["variant"]] = row["us"]
    parts = [
        wrapped(
            f"Microseconds per call, made on {found['date']} at commit {found['commit']}: one "
            "query token, requests of equal lengths, pages of 64 tokens, KV not in L2, bf16 (the "
            "kernel int8-v11: int8). A bf16 time below the bound refutes the device's numbers."
        )
    ]
    for device, source in found["sources"].items():
        mine = {call: times for call, times in calls.items() if call[0] == device}
        kernels = list(dict.fromkeys(name for times in mine.values() for name in times))
        lines = [
            [*(str(number) for number in call[1:]), *(_time(times.get(name)) for name in kernels)]
            for call, times in mine.items()
        ]
        header = ["heads", "requests", "KV tokens per request", *kernels]
        parts += [wrapped(f"**{device}.** Bound: {source}."), table(header, lines, words=0)]
    return "\n\n".join(parts)


def _time(us: float | None) -> str:
    return "" if us is None else f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def scores(root: Path) -> str:
    """Returns a line per measured table, date, device and kernel that was predicted."""
    folder = root / "benchmarks" / "predictions"
    return "\n".join(
        f"- `{path.name}`: {line}."
        for path in sorted(folder.glob("measured/*.csv"))
        for line in score(path, folder)
    )
