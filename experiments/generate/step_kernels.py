"""The kernels of a decode step of a whole model, by part, as the profiler saw them on a GPU.

The model and the library name their parts with `jax.named_scope`. XLA keeps these names for each
instruction, and `experiments.speed.layer.parts` finds the instruction of a kernel. Within a part,
the kernels of matrix products have a row of their own, so that the time of the others shows.
"""

from collections.abc import Sequence

from experiments.framework.experiment import Row
from experiments.speed.layer.parts import Instructions, exclusive
from experiments.speed.timing import Kernel

PRODUCTS, ATTENTION, EXCHANGE, OTHER = (
    "matrix products", "attention", "gather and scatter", "other"
)  # fmt: skip
REST = "sums, copies, counters"  # what has no name
# Parts by the innermost scope.
PARTS = {
    "mla_projections": "projections, norms, RoPE",
    "mla_absorb": "absorption of W_UK",
    "mla_append": "append",
    "jit(_append)": "append",
    "jit(_pool_tables)": "block tables of a layer",
    "mla_attention": "attention",
    "mla_decode_plan": "plan of the attention",
    "mla_w_uv": "W_UV",
    "mla_w_o": "W_O",
    "dense_feed_forward": "dense and shared feed-forward",
    "moe_router": "router",
    "moe_gather": "experts' gather and scatter",
    "moe_experts": "experts",
    "moe_scatter": "experts' gather and scatter",
    "norm": "norms",
    "head": "head",
    "sampling": "next token",
}
MOST = 0.03  # of the step, for a part that is neither product, attention, nor gather and scatter


def part_and_kind(op_name: str) -> tuple[str, str]:
    """Returns the part and the kind of an instruction from its `op_name`.

    A product's `op_name` ends in the operation of JAX; that of the Pallas kernel for grouped
    products is the only kernel in its scope.
    """
    steps = op_name.split("/")
    part = next((PARTS[step] for step in reversed(steps) if step in PARTS), REST)
    last = steps[-1]
    is_grouped = part == PARTS["moe_experts"] and last in ("mpmd_map", "pallas_call")
    if last.startswith(("dot_general", "ragged_dot")) or is_grouped:
        return part, PRODUCTS
    if part == PARTS["mla_attention"]:
        return part, ATTENTION
    return part, EXCHANGE if part == PARTS["moe_gather"] else OTHER


def rows_of_kernels(kernels: Sequence[Kernel], hlo: str, steps: int) -> list[Row]:
    """Returns a row per part and kind: GPU microseconds and kernels per step, share of all.

    Args:
        kernels: of so many steps, from `timing.traced_kernels`.
        hlo: the text of the compiled step.
    """
    instructions = Instructions.of(hlo)
    found: dict[tuple[str, str], list[float]] = {}
    for kernel, ns in exclusive(kernels):
        entry = found.setdefault(part_and_kind(instructions.op_name(kernel)), [0.0, 0.0])
        entry[0] += ns / steps / 1e3
        entry[1] += 1 / steps
    whole = sum(us for us, _ in found.values())
    rows = [
        {
            "part": part, "kind": kind, "gpu_us": us, "kernels": count,
            "of_gpu_time": us / whole,
            "above_3_percent": kind == OTHER and us > MOST * whole,
        }
        for (part, kind), (us, count) in found.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["gpu_us"])


def attention_us(rows: Sequence[Row]) -> float:
    """Returns the GPU time of the attention of all layers, in microseconds per step."""
    return sum(row["gpu_us"] for row in rows if row["kind"] == ATTENTION)
