"""Decides what the demo runs on a machine, as a pure function of the machine.

On a CPU, every available implementation runs a small batch through the layer. On a GPU compilation
takes most of the time, so that only fast implementations run this batch. In addition the attention
of a larger batch, as servers have it, is timed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.speed.decode.setup import Setup
from experiments.speed.prefill_batches import Batch
from experiments.speed.shapes import Shape
from mla_jax.registry import available_implementations

# On a GPU, the first two of these that are available run the small batch. These are the Hopper
# kernels and the portable implementation, or that and the reference.
ON_A_GPU = ("hopper", "xla", "reference")
TIMED = ("hopper", "xla")  # compared on the larger batch
DECODE_HEADS = (16, 128)  # of one layer on one of 8 GPUs, and on one GPU
PREFILL_HEADS = 128  # one only, because each program takes seconds to compile
DECODE_BATCHES, DECODE_KV = (128, 64, 32, 16, 8, 4, 2, 1), 4096
PREFILL_BATCHES, PREFILL_TOKENS = (4, 2, 1), 1024
PAGE_SIZE = 64
LAYERS = 4  # each has its own cache, so that none is found in the L2 cache
MEMORY_SHARE = 0.5  # of the device's memory for the larger batch
# Bytes per query row that `xla` needs at once, approximately: q and o in bfloat16, the output in
# float32 twice, and three blocks of 256 scores.
XLA_ROW_BYTES = 2 * (576 + 512) + 2 * 4 * 512 + 3 * 4 * 256
NOT_ON_A_GPU = "left out: on a GPU the demo runs the fast ones; --implementations names others"


@dataclasses.dataclass(frozen=True)
class Machine:
    """The properties of a machine that the choice depends on.

    memory: bytes for arrays, or None if the device does not say.
    reasons: by implementation, why it can't run here, or None if it can.
    """

    platform: str
    kind: str
    memory: int | None
    reasons: Mapping[str, str | None]

    @staticmethod
    def here() -> "Machine":
        """Returns the machine with JAX's default device."""
        device = jax.devices()[0]
        statistics = device.memory_stats() or {}
        memory = statistics.get("bytes_limit")
        return Machine(device.platform, device.device_kind, memory, available_implementations())

    @property
    def available(self) -> list[str]:
        """The implementations that can run here."""
        return [name for name, reason in self.reasons.items() if reason is None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the demo runs.

    dtype: dtype of the layer.
    implementations: those that run the small batch.
    not_run: by name, why another implementation does not run it.
    served: decode steps whose attention is timed; empty if nothing is timed.
    prefilled: the batch whose prefill attention is timed, or None.
    timed: the implementations that are timed on them; empty if nothing is timed.
    """

    dtype: str
    implementations: tuple[str, ...]
    not_run: Mapping[str, str]
    served: tuple[Shape, ...] = ()
    prefilled: Batch | None = None
    timed: tuple[str, ...] = ()


def plan(
    machine: Machine,
    *,
    dtype: str | None = None,
    implementations: Sequence[str] = (),
    served: bool = True,
) -> Plan:
    """Returns what the demo runs on a machine.

    Args:
        machine: any machine, not only this one.
        dtype: dtype of the layer; None is bfloat16 on a GPU, else float32.
        implementations: names that can run on the machine; empty lets the machine decide.
        served: whether to time a larger batch on a GPU.
    """
    on_gpu = machine.platform == "gpu"
    if implementations:
        chosen = list(dict.fromkeys(implementations))
    elif on_gpu:
        chosen = [name for name in ON_A_GPU if name in machine.available][:2]
    else:
        chosen = machine.available
    not_run = {name: reason for name, reason in machine.reasons.items() if reason is not None}
    if on_gpu and not implementations:
        not_run |= {name: NOT_ON_A_GPU for name in machine.available if name not in chosen}
    shapes = served_shapes(machine.memory) if on_gpu and served else ()
    prefilled = prefilled_batch(machine.memory) if on_gpu and served else None
    timed = tuple(name for name in TIMED if name in chosen) if shapes or prefilled else ()
    return Plan(
        dtype=dtype or ("bfloat16" if on_gpu else "float32"),
        implementations=tuple(chosen),
        not_run=not_run,
        served=shapes if timed else (),
        prefilled=prefilled if timed else None,
        timed=timed,
    )


def served_shapes(memory: int | None) -> tuple[Shape, ...]:
    """Returns decode steps of one token, in the largest batches that fit.

    A device that does not say how much memory it has counts as one of 8 GiB.
    """
    shapes: list[Shape] = []
    for heads in DECODE_HEADS:
        steps = (Shape(batch, "bf16", heads, 1, PAGE_SIZE, "uniform", DECODE_KV)
                 for batch in DECODE_BATCHES)  # fmt: skip
        shapes += [step for step in steps if needed_bytes(step) <= _limit(memory)][:1]
    return tuple(shapes)


def prefilled_batch(memory: int | None) -> Batch | None:
    """Returns the largest batch of prompts that fits, or None."""
    batches = (Batch(requests, PREFILL_TOKENS) for requests in PREFILL_BATCHES)
    return next((batch for batch in batches if prefill_bytes(batch) <= _limit(memory)), None)


def _limit(memory: int | None) -> int:
    return int(MEMORY_SHARE * (8 << 30 if memory is None else memory))


def needed_bytes(shape: Shape) -> int:
    """Returns the approximate bytes of the layers' caches and of the arrays of `xla`."""
    cache = LAYERS * sum(shape.seq_lens) * served_setup(0).token_bytes(shape.dtype)
    block = 3 * shape.batch * 256 * 2 * 576  # of gathered keys
    return cache + block + shape.batch * shape.s_q * shape.heads * XLA_ROW_BYTES


def prefill_bytes(batch: Batch) -> int:
    """Returns the approximate bytes of q, o and the layers' keys and values in bfloat16."""
    row = 2 * (128 + 64 + 128)  # bytes of q and o, or of K and V, per token and head
    xla = 6 * row  # of its results in float32 and its blocks of scores
    return batch.num_keys * PREFILL_HEADS * ((LAYERS + 1) * row + xla)


def served_setup(memory: int | None) -> Setup:
    """Returns how the larger batch is timed: bursts of `LAYERS` launches, once or twice."""
    limit = 8 << 30 if memory is None else memory
    layers: dict[str, Any] = {"min_layers": 1, "usual_layers": LAYERS, "max_layers": LAYERS}
    return Setup(limit, rotate=0, launches=2 * LAYERS, rounds=7, **layers)
