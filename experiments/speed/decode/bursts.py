"""Bursts of launches: how long one takes, and how several are timed in turn."""

from collections.abc import Mapping

from experiments.speed import timing
from experiments.speed.decode.setup import Setup
from experiments.speed.shapes import Shape

LONG_BURST = 0.02  # seconds, approximately; longer bursts slow down a card at its power limit


def estimated_seconds(row: Shape, setup: Setup) -> float:
    """Returns the approximate time of a launch on an H200, to choose the launches of a burst."""
    tokens = sum(row.seq_lens)
    flops = 2 * tokens * row.s_q * row.heads * (setup.width + setup.kv_lora_rank)
    return max(1e-5, tokens * setup.token_bytes(row.dtype) / 4e12, flops / 6e14)


def time_bursts(
    bursts: Mapping[str, timing.Burst], *, rounds: int, pause: float
) -> dict[str, timing.Timing]:
    """Times all bursts in turn, slow ones in fewer rounds."""
    once = {}
    for name, burst in bursts.items():
        burst.run(1)
        once[name] = burst.run(1)[1]
    found: dict[str, timing.Timing] = {}
    for slow in (False, True):
        group = {name: bursts[name] for name in bursts if (once[name] > 3 * LONG_BURST) == slow}
        if group:
            found |= timing.measure(group, rounds=3 if slow else rounds, pause=pause)
    return found
