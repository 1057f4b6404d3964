"""Tables of a decode step of a whole layer (`layer_step`), and of attention over several GPUs."""

from pathlib import Path

from tables_common import CARDS, Row, read, result_of, table, wrapped

PLANS = {"given": "given", "own": "made in the call"}
WHOLE = "whole step"
SPLITS = {"keys": "the keys", "heads": "the heads", "requests": "the requests"}


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


def sharded(root: Path, card: str) -> str:
    """The time of a decode step on one GPU and on more; a target that is missed is bold."""
    result = result_of(root, card, "sharded")
    one, lines = "", []
    for row in result["rows"]:
        if row["devices"] == 1:
            one = f"{row['us']:.0f}"
            continue
        speed = f"{row['speed_over_one']:.3f}"
        lines.append([
            SPLITS[row["split"]],
            *(f"{row[name]}" for name in ("heads", "batch", "kv_len")),
            one,
            f"{row['us']:.0f}",
            f"**{speed}**" if row["speed_over_one"] < row["wanted"] else speed,
            f"{row['wanted']}",
        ])  # fmt: skip
    versions, devices = result["environment"]["versions"], result["options"]["devices"]
    caption = (
        f"Microseconds per launch in bursts, collectives included: bfloat16, {devices} x "
        f"{CARDS[card]}, {result['started'][:10]}, jax {versions['jax']}, our code at "
        f"{versions['commit']}."
    )
    header = [
        "split by",
        "heads",
        "requests",
        "KV tokens per request",
        "one GPU",
        f"{devices} GPUs",
    ]
    return f"{wrapped(caption)}\n\n{table([*header, 'speed', 'target'], lines)}"
