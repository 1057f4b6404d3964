"""Table of a decode step of a whole model on a GPU, from a committed result of `generate`."""

from pathlib import Path

from tables_common import CARDS, read, table, wrapped

from experiments.generate.parts import OP, STEP


def kernels(root: Path, card: str) -> str:
    """The GPU time of the step's kernels by part and kind, and the attention beside the op."""
    path = root / "benchmarks" / "measured" / f"{card}_generate.json"
    if not path.is_file():
        return "No result is committed yet."
    result = read(path)
    step, versions = result["step"], result["environment"]["versions"]
    us = {row["part"]: row for row in result["rows"] if "part" in row}
    caption = (
        f"Microseconds of GPU time per decode step, by the profiler, without CUDA graphs: "
        f"{step['requests']} requests of {step['context']} tokens, {result['dtype']}, random "
        f"weights of {result['weights'] / 1e9:.1f} billion. {CARDS[card]}, "
        f"{result['started'][:10]}, jax {versions['jax']}, our code at {versions['commit']}. "
        f"With CUDA graphs, {us[STEP]['us'] / 1e3:.2f} ms pass from step to step. Serving "
        f"{result['tokens']:,} new tokens, with prefill, makes "
        f"{result['new_tokens_per_second']:,.0f} of them per second."
    )
    if not step["kernels"]:
        return wrapped(f"{caption} The kernels have no names: {step['kernels_failed']}.")
    caption += (
        f" All kernels take {sum(row['gpu_us'] for row in step['kernels']) / 1e3:.2f} ms."
        f" The attention op alone takes {us[OP]['us_per_layer']:.1f} us per layer, in the step "
        f"{step['attention_over_op_alone']:.3f} times as long."
    )
    lines = [
        [
            row["part"], row["kind"], f"{row['gpu_us']:.0f}", f"{row['of_gpu_time']:.1%}",
            f"{row['kernels']:.0f}", "yes" if row["above_3_percent"] else "",
        ]
        for row in step["kernels"]
    ]  # fmt: skip
    header = ["part", "kind", "us", "share", "kernels", "above 3 %"]
    return f"{wrapped(caption)}\n\n{table(header, lines, words=2)}"
