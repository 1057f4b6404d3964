"""The table of attention over several GPUs, from a committed result of the experiment `sharded`."""

from pathlib import Path

from tables_common import CARDS, result_of, table, wrapped

SPLITS = {"keys": "the keys", "heads": "the heads", "requests": "the requests"}


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
