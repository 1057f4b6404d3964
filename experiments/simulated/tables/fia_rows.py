"""Predicts rows of the published tables of FIA, CANN's fused-infer-attention operator.

The rows name an Atlas 800T A2, that is an Ascend 910B of a variant that is not said. The model
takes it for an Ascend910B3, whose 20 cores fit better than 24.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence

from mla_jax.hal import HardwareProfile, Problem, load_profile
from mla_jax.hal.simulator.ascend_costs import ASCEND_KERNELS, AscendKernel
from mla_jax.hal.simulator.simulate import Report, simulate

DEVICE = "Ascend910B3"
DEVICES = ("Ascend910B1", "Ascend910B2", "Ascend910B3")  # those with 1.6 TB/s, as the rows need
TABLES = ("ascend_910b_fia_mla_decode.csv", "ascend_910b_fia_mla_prefill.csv")
CONTIGUOUS = 2**30  # page size of a cache whose requests are contiguous
SEED = 25  # of the half of the rows that constants are fitted on

_PUBLISHED_DEVICE = "Ascend 910B (Atlas 800T A2)"
_KERNELS = {
    "CANN FIA npu_fused_infer_attention_score_v2 MLA decode": "fia",
    "CANN FIA causal prefill MHA 192/128": "fia-prefill",
}

Row = Mapping[str, str]


def is_fia(row: Row) -> bool:
    """Returns whether a row is one of FIA's."""
    return row.get("kernel") in _KERNELS


def fia_kernel(row: Row) -> AscendKernel:
    """Returns the kernel of a row. The rows were timed by calls repeated on one cache."""
    return dataclasses.replace(ASCEND_KERNELS[_KERNELS[row["kernel"]]], replayed=True)


def fia_report(row: Row, profile: HardwareProfile | None = None) -> Report:
    """Returns the model's report for a row. Raises ValueError for a cell that it can't predict."""
    if row.get("dtype", "bf16") != "bf16":
        raise ValueError(f"dtype = {row['dtype']!r}, wanted bf16 for {row['kernel']}")
    if row.get("lengths", "uniform") != "uniform":
        raise ValueError(f"lengths = {row['lengths']!r}, wanted uniform for {row['kernel']}")
    if profile is None:
        name = row["device"]
        profile = load_profile(DEVICE if name == _PUBLISHED_DEVICE else name)
    problem = Problem(
        kv_lens=(int(row["kv_len"]),) * int(row["batch"]),
        heads=int(row["heads"]),
        s_q=int(row["s_q"]),
        page_size=int(row["page_size"] or CONTIGUOUS),
    )
    return simulate(profile, problem, fia_kernel(row))


def halves[T](rows: Sequence[T], seed: int = SEED) -> tuple[list[T], list[T]]:
    """Returns the half of a table that constants are fitted on, and the other half."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    fitted = set(order[: (len(rows) + 1) // 2])
    return (
        [row for i, row in enumerate(rows) if i in fitted],
        [row for i, row in enumerate(rows) if i not in fitted],
    )


def fitted_and_other[T](table: str, rows: Sequence[T]) -> tuple[list[T], list[T]]:
    """Returns the rows of a table that constants were fitted on, and the others."""
    if table.startswith("ascend"):
        return halves(rows)
    return list(rows[::2]), list(rows[1::2])


# Figures that sources give in text and not in a table. None of them was fitted.
CHUNK_GAIN = {4096: 1.045, 2048: 1.092}  # int8, one request, chunk 4 over chunk 1
AMLA_SHARE = 0.868


def text_figures(profile: HardwareProfile) -> list[tuple[str, float, float]]:
    """Returns (what, model, published) of the figures in text, as ratios."""
    found = []
    for kv_len, gain in CHUNK_GAIN.items():
        problem = Problem((kv_len,), 128, kv_dtype="int8")
        one, four = (simulate(profile, problem, k).seconds for k in ("int8-chunk1", "int8-chunk4"))
        found.append((f"chunk 4 over chunk 1, kv {kv_len}", one / four, gain))
    package = load_profile("Ascend910C")
    call = Problem((16384,) * package.cores, 128, 2)
    share = simulate(package, call, "amla").utilisation
    return [*found, ("AMLA, share of the cube's peak", share, AMLA_SHARE)]


def amla_gains(profile: HardwareProfile) -> list[dict[str, float | str]]:
    """Returns AMLA beside chunk 4 by query tokens and heads, one request of 16384 per core."""
    amla = ASCEND_KERNELS["amla"]
    chunk4 = dataclasses.replace(ASCEND_KERNELS["bf16-chunk4"], q_tokens=amla.q_tokens)
    rows: list[dict[str, float | str]] = []
    for s_q in (1, 2):
        for heads in (16, 32, 64, 128):
            problem = Problem((16384,) * profile.cores, heads, s_q)
            with_up, without = (simulate(profile, problem, k) for k in (chunk4, amla))
            rows.append({
                "s_q": s_q,
                "heads": heads,
                "chunk4_us": with_up.seconds * 1e6,
                "amla_us": without.seconds * 1e6,
                "gain": with_up.seconds / without.seconds,
                "chunk4_share_of_peak": with_up.utilisation,
                "amla_share_of_peak": without.utilisation,
            })  # fmt: skip
    return rows
