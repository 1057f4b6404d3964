"""Tables of a decode step of a whole layer on a GPU, from a committed result of `layer_step`."""

from pathlib import Path

from tables_common import CARDS, Row, read, table, wrapped

PLANS = {"given": "given", "own": "made in the call"}
WHOLE = "whole step"


def steps(root: Path, card: str) -> str:
    """The time of a step, with both plans."""
    path = _path(root, card)
    if not path.is_file():
        return "No result is committed yet."
    result = read(path)
    lines = [
        [
            row["case"],
            PLANS[row["plan"]],
            *(f"{row[column]:.1f}" for column in ("us", "us_sustained", "gpu_us")),
            f"{row['kernels']:.0f}",
            f"{row['memory_us']:.1f}",
        ]
        for row in result["rows"]
        if row["part"] == WHOLE
    ]
    header = ["requests x tokens", "plan", "back to back", "sustained", "GPU busy", "kernels"]
    found = table([*header, "bytes alone"], lines, words=2)
    versions, options = result["environment"]["versions"], result["options"]
    caption = (
        f"Microseconds per step of a layer of {options['model']}, bfloat16, pages of "
        f"{options['page_size']} tokens: in short bursts, and for {options['sustained_ms']:.0f} ms "
        f"without a pause. {CARDS[card]}, {result['started'][:10]}, jax {versions['jax']}, our "
        f"code at {versions['commit']}."
    )
    return f"{wrapped(caption)}\n\n{found}"


def parts(root: Path, card: str) -> str:
    """The GPU time, the kernels and the bytes of each part of a step."""
    path = _path(root, card)
    if not path.is_file():
        return ""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in read(path)["rows"]:
        if row["part"] != WHOLE:
            found.setdefault((row["case"], row["part"]), {})[row["plan"]] = row
    lines = []
    for (case, part), plans in found.items():
        any_plan = plans["given"]
        cells = [f"{any_plan['bytes'] / 1e6:.1f}", f"{any_plan['memory_us']:.1f}"]
        for plan in PLANS:
            cells += [f"{plans[plan]['gpu_us']:.1f}", f"{plans[plan]['kernels']:.0f}"]
        lines.append([case, part, *cells])
    header = ["requests x tokens", "part", "MB", "bytes alone"]
    for text in PLANS.values():
        header += [f"plan {text}", "kernels"]
    return table(header, lines, words=2)


def _path(root: Path, card: str) -> Path:
    return root / "benchmarks" / "measured" / f"{card}_layer_step.json"
