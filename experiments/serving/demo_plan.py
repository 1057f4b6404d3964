"""What the demo runs on a machine: a pure function of what the machine has.

On a CPU a small ragged batch goes through the layer with every implementation that runs there. On
a GPU compilation takes most of the time, so only the fast implementations serve that batch, and the
attention of a batch of a size that people serve is timed as well.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from experiments.speed.decode_bench import Setup
from experiments.speed.shapes import Shape
from mla_jax.registry import available_implementations

# On a GPU, the first two of these that run there serve the small batch: the kernels and the
# portable implementation, or that and the definition.
ON_A_GPU = ("hopper", "xla", "reference")
TIMED = ("hopper", "xla")  # side by side on the served batch
DECODE_HEADS = (16, 128)  # of a model's layer on one of 8 GPUs, and on one GPU
PREFILL_HEADS = (128,)  # (each program takes seconds to compile, and the demo 90 in all)
DECODE_BATCHES, DECODE_KV = (128, 64, 32, 16, 8, 4, 2, 1), 4096
PREFILL_BATCHES, PREFILL_TOKENS = (4, 2, 1), 1024
PAGE_SIZE = 64
LAYERS = 4  # with a cache of their own each, so that none is found in the L2 cache
MEMORY_SHARE = 0.5  # of the device's memory that a served batch may take
# Bytes per query row that `xla` holds at once, about: q and o in bfloat16, the output in float32
# twice, and three blocks of 256 scores.
XLA_ROW_BYTES = 2 * (576 + 512) + 2 * 4 * 512 + 3 * 4 * 256
NOT_ON_A_GPU = "left out: on a GPU the demo runs the fast ones; --implementations names others"


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the choice depends on.

    `memory`: bytes that arrays may take, None where the device does not say. `reasons`: why an
    implementation can't run here, by its name; None where it can.
    """

    platform: str
    kind: str
    memory: int | None
    reasons: Mapping[str, str | None]

    @staticmethod
    def here() -> "Machine":
        """The machine with JAX's default device."""
        device = jax.devices()[0]
        statistics = device.memory_stats() or {}
        memory = statistics.get("bytes_limit")
        return Machine(device.platform, device.device_kind, memory, available_implementations())

    @property
    def available(self) -> list[str]:
        """Implementations that can run here."""
        return [name for name, reason in self.reasons.items() if reason is None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What runs.

    `dtype` is the layer's. `implementations` serve the small ragged batch; `not_run` says of each
    other one why it does not. `served` are the shapes whose attention is timed, with the contenders
    in `timed`; both are empty where nothing is timed.
    """

    dtype: str
    implementations: tuple[str, ...]
    not_run: Mapping[str, str]
    served: tuple[Shape, ...] = ()
    timed: tuple[str, ...] = ()


def plan(
    machine: Machine,
    *,
    dtype: str | None = None,
    implementations: Sequence[str] = (),
    served: bool = True,
) -> Plan:
    """What the demo runs on a machine.

    Args:
        machine: may be any, also one that is not there.
        dtype: of the layer; None: bfloat16 on a GPU, else float32.
        implementations: names that can run on the machine; empty: the machine's own choice.
        served: whether to time a served batch where the machine is a GPU.
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
    timed = tuple(name for name in TIMED if name in chosen) if shapes else ()
    return Plan(
        dtype=dtype or ("bfloat16" if on_gpu else "float32"),
        implementations=tuple(chosen),
        not_run=not_run,
        served=shapes if timed else (),
        timed=timed,
    )


def served_shapes(memory: int | None) -> tuple[Shape, ...]:
    """Decode steps of one token and prefill chunks, in the largest batches that fit in memory.

    A device that does not say what it has is taken for a small one, of 8 GiB.
    """
    limit = int(MEMORY_SHARE * (8 << 30 if memory is None else memory))
    shapes = []
    for all_heads, batches, tokens, kv_len in (
        (DECODE_HEADS, DECODE_BATCHES, 1, DECODE_KV),
        (PREFILL_HEADS, PREFILL_BATCHES, PREFILL_TOKENS, PREFILL_TOKENS),
    ):
        for heads in all_heads:
            fitting = [
                shape
                for batch in batches
                if needed_bytes(shape := _shape(batch, heads, tokens, kv_len)) <= limit
            ]
            shapes += fitting[:1]
    return tuple(shapes)


def needed_bytes(shape: Shape) -> int:
    """Bytes of the layers' caches and of what `xla` holds beside them, about."""
    cache = LAYERS * sum(shape.seq_lens) * served_setup(0).token_bytes(shape.dtype)
    block = 3 * shape.batch * 256 * 2 * 576  # of gathered keys
    return cache + block + shape.batch * shape.s_q * shape.heads * XLA_ROW_BYTES


def served_setup(memory: int | None) -> Setup:
    """How the served batch is timed: bursts of `LAYERS` launches, once or twice."""
    limit = 8 << 30 if memory is None else memory
    layers = {"min_layers": 1, "usual_layers": LAYERS, "max_layers": LAYERS}
    return Setup(limit, rotate=0, launches=2 * LAYERS, rounds=7, **layers)


def _shape(batch: int, heads: int, tokens: int, kv_len: int) -> Shape:
    return Shape(batch, "bf16", heads, tokens, PAGE_SIZE, "uniform", kv_len)
