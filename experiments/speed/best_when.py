"""Summarizes a benchmark by classes of shapes: the fastest of each, and ratios to baselines.

It uses the standard library only, so that tools/tables.py can import it without dependencies.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

BASELINE = "jnp"  # plain JAX over contiguous KV, compiled by XLA
PEERS = (
    "flashinfer_fa2",
    "flashinfer_fa3",
)  # the baselines of experiments/speed/baselines.py
AXES = ("batch", "dtype", "heads", "s_q", "page_size", "lengths", "kv_len")
LONG = 8192  # KV tokens per request from which a context counts as long
MANY = 32  # requests from which a batch counts as many


def class_of(row: Row) -> Row:
    """Returns the class of a row's shape, as the columns that name it."""
    batch, kv_len = row["batch"], row["kv_len"]
    return {
        "heads": row["heads"],
        "tokens": row["s_q"],
        "requests": "one" if batch == 1 else f"{MANY} or more" if batch >= MANY else "a few",
        "context": f"{LONG} or more" if kv_len >= LONG else f"below {LONG}",
        "lengths": "ragged" if row["lengths"] == "varlen" else "equal",
        "page size": row["page_size"],
        "cache": row["dtype"],
    }


def best_when(rows: Iterable[Row]) -> list[Row]:
    """Returns one row per class: which is fastest on how many shapes, and ratios of our best.

    Ours is the fastest that is neither a baseline library nor `jnp`. A ratio above 1 says that ours
    is faster. The time of the baseline is the smallest in the run or in `peer_us`. Ratios are
    geometric means, with the smallest and largest if a class has several shapes.
    """
    shapes: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.get("status") == "measured":
            shapes.setdefault(tuple(row[axis] for axis in AXES), []).append(row)
    classes: dict[tuple, list[list[Row]]] = {}
    for found in shapes.values():
        classes.setdefault(tuple(class_of(found[0]).items()), []).append(found)
    return [_summary(dict(key), found) for key, found in sorted(classes.items(), key=_order)]


def ratio_words(values: Sequence[float]) -> str:
    """Returns mean, smallest and largest as "1.07 (0.93 to 1.20)", or one number if all agree."""
    if not values:
        return ""
    mean = f"{statistics.geometric_mean(values):.2f}"
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return mean if least == most else f"{mean} ({least} to {most})"


def _order(item: tuple[tuple, Any]) -> tuple:
    key = dict(item[0])
    return (key["cache"], key["page size"] != 64, key["page size"], key["tokens"], key["heads"],
            ("one", "a few").index(key["requests"]) if key["requests"] in ("one", "a few") else 2,
            key["context"][0] != "b", key["lengths"])  # fmt: skip


def _summary(key: Row, shapes: Sequence[Sequence[Row]]) -> Row:
    wins: dict[str, int] = {}
    over_peer, over_baseline, share = [], [], []
    for rows in shapes:
        times = {row["implementation"]: row["us"] for row in rows}
        fastest = min(times, key=lambda name: times[name])
        wins[fastest] = wins.get(fastest, 0) + 1
        ours = [row for row in rows if row["implementation"] not in (*PEERS, BASELINE)]
        if not ours:
            continue
        best = min(ours, key=lambda row: row["us"])
        known = [times[name] for name in PEERS if name in times]
        known += [best["peer_us"]] if best.get("peer_us") else []
        if known:
            over_peer.append(min(known) / best["us"])
        if BASELINE in times:
            over_baseline.append(times[BASELINE] / best["us"])
        elif best.get("speed_over_jnp"):  # relative to the same shape with other pages
            over_baseline.append(best["speed_over_jnp"])
        if best.get("of_ceiling"):
            share.append(best["of_ceiling"])
    ordered = sorted(wins.items(), key=lambda item: (-item[1], item[0]))
    return {
        **key,
        "shapes": len(shapes),
        "fastest": ", ".join(f"{name} {n}" if len(wins) > 1 else name for name, n in ordered),
        "ours against the best peer": ratio_words(over_peer),
        "ours against jnp under XLA": ratio_words(over_baseline),
        "of the ceiling, %": 100 * statistics.fmean(share) if share else None,
    }
