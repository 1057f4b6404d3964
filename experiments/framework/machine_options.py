"""Flags and rows that all experiments on simulated machines share."""

import dataclasses
from typing import Any

from experiments.framework.experiment import Row, reading
from experiments.framework.options import flag
from mla_jax.hal import HardwareProfile, Problem, Report, load_profile, plan_tiles
from mla_jax.hal.work import ITEMSIZE


@dataclasses.dataclass(frozen=True)
class MachineOptions:
    profile: str = flag("H200_SXM", "a device of mla_jax.hal.PROFILES, or a JSON file with one")
    batch: int = flag(0, "requests; 0 is one per core", lower_bound=0)
    kv_len: int = flag(0, "tokens per request; 0 is 8 KV blocks", lower_bound=0)
    heads: int = flag(0, "query heads; 0 is 128 on Ascend, 64 on a GPU", lower_bound=0)
    s_q: int = flag(1, "query tokens per request", lower_bound=1)
    dtype: str = flag("bf16", "of the KV cache", choices=tuple(ITEMSIZE))


def machine_and_problem(options: Any) -> tuple[HardwareProfile, Problem]:
    """Returns the profile and the problem that MachineOptions describe."""
    with reading("profile"):
        profile = load_profile(options.profile)
    heads = options.heads or (128 if profile.family == "ascend" else 64)
    small = Problem((1,), heads, options.s_q, options.dtype)
    with reading("profile"):  # the buffers of a user's profile may be too small for any tile
        block = plan_tiles(profile, small).block_kv
    lengths = (options.kv_len or 8 * block,) * (options.batch or profile.cores)
    return profile, Problem(lengths, heads, options.s_q, options.dtype)


def report_row(report: Report) -> Row:
    """Returns a report as a row of result.json.

    `utilisation` and the bubbles are shares of the time of a core's matrix unit and add up to 1.
    `of_matrix_peak` is the share of the device's peak over the whole call.
    """
    return {
        "schedule": report.timeline.schedule.name,
        "kernel": report.name,
        "us": report.seconds * 1e6,
        "bound_by": report.bound_by,
        "engine": report.engine,
        "tflops": report.tflops,
        "gb_per_s": report.gb_per_s,
        "of_matrix_peak": report.utilisation,
        "utilisation": report.matrix_busy,
        **{f"bubble_{w.replace(' ', '_')}": share for w, share in report.bubbles.items()},
    }
