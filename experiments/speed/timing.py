"""Times work on a GPU in short bursts of launches; the time per launch is a slope.

A `Burst` is a few launches of one workload in one asynchronous call. The call is a jitted function
that XLA turns into a CUDA graph, or a graph that torch captured. `measure` runs every burst once
and then several times, and divides the difference by the extra launches. This cancels the cost of
the host and of the first launch. Bursts are short and pauses follow, because a card at its power
limit slows down while it works. Bursts alternate in changing order. Only ratios within one
`measure` are reliable.

The launches of a burst follow each other in one of two ways:
  back to back   directly, so that launches may overlap
  separated      with a small dependent kernel between them, as in a model
"""

import itertools
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

L2_BYTES = 60 << 20  # L2 cache of an H200
MOST_REPEATS = 512  # repeats up to which `measure` goes if noise hides the work
# Independent launches of a graph must not run side by side.
ONE_AFTER_THE_OTHER = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}


@dataclass(frozen=True)
class Burst:
    """A burst: `enqueue` starts `launches` launches and returns, `wait` waits for them."""

    launches: int
    enqueue: Callable[[], Any]
    wait: Callable[[], Any]

    def run(self, repeats: int) -> tuple[float, float]:
        """Returns the seconds until `repeats` bursts were enqueued, and until they were done."""
        start = time.perf_counter()
        for _ in range(repeats):
            self.enqueue()
        enqueued = time.perf_counter()
        self.wait()
        return enqueued - start, time.perf_counter() - start


@dataclass(frozen=True)
class Timing:
    """Microseconds per launch: median and quartiles over the rounds.

    `host_bound` says that enqueueing took almost as long as the work, so that the time is the
    host's.
    """

    us: float
    low: float
    high: float
    host_bound: bool


def measure(
    bursts: Mapping[str, Burst],
    *,
    rounds: int = 15,
    seconds: float = 0.006,
    pause: float = 0.03,
) -> dict[str, Timing]:
    """Times every burst in turn, `rounds` times, `pause` seconds apart.

    The order changes in each round, see `orders`, because a card is warmer after a heavy burst.

    A round runs a burst once, and then as many more times as fill `seconds`. The delays of the host
    are then small relative to the difference. If noise still exceeds the work of a burst (its lower
    quartile is not above 0), all bursts are timed again over four times as long.

    Raises RuntimeError naming the bursts that stay below the noise at MOST_REPEATS repeats.
    """
    repeats = {}
    for name, burst in bursts.items():
        for _ in range(2):
            burst.run(1)
        _, once = burst.run(1)
        repeats[name] = min(max(1, math.ceil(seconds / once)), MOST_REPEATS)
    samples: dict[str, list[float]] = defaultdict(list)
    enqueueing: dict[str, list[float]] = defaultdict(list)
    names = list(bursts)
    for order in itertools.islice(orders(len(names)), rounds):
        for name in (names[i] for i in order):
            burst = bursts[name]
            time.sleep(pause)
            burst.run(1)  # a card is slower after a pause, which would reduce the slope
            _, once = burst.run(1)
            enqueued, more = burst.run(1 + repeats[name])
            samples[name].append((more - once) / (repeats[name] * burst.launches) * 1e6)
            enqueueing[name].append(enqueued / more)
    timings = {
        name: Timing(
            us=statistics.median(values),
            low=float(np.quantile(values, 0.25)),
            high=float(np.quantile(values, 0.75)),
            host_bound=statistics.median(enqueueing[name]) > 0.9,
        )
        for name, values in samples.items()
    }
    lost = [name for name, timing in timings.items() if timing.low <= 0]
    if not lost:
        return timings
    if all(repeats[name] >= MOST_REPEATS for name in lost):
        raise RuntimeError(f"lost in noise, at {MOST_REPEATS} repeats: {', '.join(lost)}")
    return measure(bursts, rounds=rounds, seconds=4 * seconds, pause=pause)


def orders(count: int) -> Iterator[list[int]]:
    """Yields orders of 0 .. count - 1 without end; each follows each other equally often.

    It does so once in every `count` orders, or twice in 2 * count if that is odd. The orders are
    the rows of a balanced square (E. J. Williams, 1949, Aust. J. Sci. Res. A 2, 149).
    """
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]  # 0, 1, -1, 2, ...
    for start in itertools.count():
        order = [(start + step) % count for step in zigzag]
        yield order[::-1] if count % 2 and start % 2 else order


def asynchronous(compiled: Callable[..., Any], arguments: tuple, launches: int) -> Burst:
    """Returns a burst that calls a compiled function, which makes so many launches."""
    running: list[Any] = []

    def enqueue() -> None:
        running[:] = [compiled(*arguments)]

    return Burst(launches, enqueue, lambda: jax.block_until_ready(running))


@dataclass(frozen=True)
class ModelProgram:
    """The attention of a model's decode steps, compiled for arrays of some shapes.

    It attends `launches` times, each time to the cache of the next layer. All layers share what
    belongs to the step: block tables, lengths and a plan. Checks that layers share are therefore
    made once, as in a model. KV that exceeds L2 is never found in L2.
    """

    launches: int
    compiled: Callable[..., Any]

    def burst(self, q: jax.Array, layers: Sequence[Any], shared: Any) -> Burst:
        """Returns the burst for arrays of the shapes that it was compiled for."""
        return asynchronous(self.compiled, (q, layers, shared), self.launches)

    def last_output(self, q: jax.Array, layers: Sequence[Any], shared: Any) -> Any:
        """Returns the output of the last launch, on layer (launches - 1) % len(layers)."""
        return self.compiled(q, layers, shared)[1]


def compile_model(
    step: Callable[..., Any],
    q: Any,
    layers: Sequence[Any],
    shared: Any,
    *,
    passes: int = 1,
    separated: bool = False,
    compiler_options: Mapping[str, str] = ONE_AFTER_THE_OTHER,
) -> ModelProgram:
    """Compiles a program that runs `step(q, layer, shared)` for all layers, `passes` times.

    Args:
        step: returns a pytree of arrays.
        q: floating point array. A kernel between launches reads the output and then writes q's
            first element, always with the same value. This makes the launches dependent. XLA
            may copy q in every burst for that, so a large array does not belong here.
        layers: pytrees of arrays or `jax.ShapeDtypeStruct`, as q is.
        shared: a pytree of the same kind.
        passes: how often the layers are run.
        separated: whether q is written after every launch, as by a model's next layer, or only at
            the end of a pass.
        compiler_options: options for XLA.
    """
    step = jax.jit(step)

    def after(q: jax.Array, firsts: Sequence[jax.Array]) -> jax.Array:
        total = jnp.stack(firsts).sum()
        return q.at[(0,) * q.ndim].add((total != total).astype(q.dtype))

    def program(q: jax.Array, layers: Sequence[Any], shared: Any) -> tuple[jax.Array, Any]:
        output = None
        for _ in range(passes):
            firsts = []
            for layer in layers:
                # The barrier keeps XLA from computing only the element that is read.
                output = jax.lax.optimization_barrier(step(q, layer, shared))
                leaf = jax.tree.leaves(output)[0]
                firsts.append(leaf[(0,) * leaf.ndim].astype(jnp.float32))
                if separated:
                    q = after(q, firsts[-1:])
            if not separated:
                q = after(q, firsts)
        return q[(0,) * q.ndim], output

    lowered = jax.jit(program).lower(q, layers, shared)
    compiled = lowered.compile(compiler_options=dict(compiler_options))
    return ModelProgram(passes * len(layers), compiled)


def torch_burst(
    call: Callable[[int], Any],
    launches: int,
    *,
    cycles: int = 1,
    separated: Callable[[], Any] | None = None,
) -> Burst:
    """Captures `call(0)`, ..., `call(launches - 1)` in a CUDA graph, replayed `cycles` times.

    `separated()` is called between launches. The burst keeps both functions alive, because the
    graph reads and writes their arrays.
    """
    import torch

    graph = torch.cuda.CUDAGraph()
    call(0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for i in range(launches):
            if separated and i:
                separated()
            call(i)

    def enqueue(_owners: tuple = (call, separated)) -> None:
        for _ in range(cycles):
            graph.replay()

    return Burst(launches * cycles, enqueue, torch.cuda.synchronize)


def decode_rates(
    us: float, seq_lens: Sequence[int], *, heads: int, seq_q: int = 1, token_bytes: int = 1152
) -> tuple[float, float]:
    """Returns TFLOPS and GB/s of an absorbed MLA decode with 576 latent and rope columns.

    V is 512 of the columns. Bytes are the KV once, and q and the output once, both 16 bit.
    Operations are those of every query token with every key, masked or not. benchmarks/published
    defines them in the same way.
    """
    rows = len(seq_lens) * seq_q * heads
    flops = 2 * sum(seq_lens) * seq_q * heads * (576 + 512)
    return flops / us / 1e6, (sum(seq_lens) * token_bytes + 2 * rows * (576 + 512)) / us / 1e3


def ceilings(gib: float = 1.0, size: int = 8192) -> dict[str, float]:
    """Measures rates of XLA here.

    They are copy and read (GB/s, read plus written), matmul in bf16 (TFLOPS), and matmul_int8 (1e12
    operations per second).
    """
    keys = jax.random.split(jax.random.key(0), 4)
    columns = 8192
    shape = int(gib * 2**30) // (2 * columns), columns
    big = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    square = [jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys]
    integers = [jax.random.randint(key, (size, size), -127, 128, jnp.int8) for key in keys]

    def burst(step: Callable[..., Any], layers: Sequence[jax.Array]) -> Burst:
        arguments = (jnp.zeros(1), layers, layers[0])
        return compile_model(step, *arguments).burst(*arguments)

    def integer_product(_: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, preferred_element_type=jnp.int32)

    timings = measure(
        {
            "copy": burst(lambda _, x, __: jnp.negative(x), big),
            "read": burst(lambda _, x, __: jnp.max(x, axis=1), big),
            "matmul": burst(lambda _, a, b: jnp.matmul(a, b), square),
            "matmul_int8": burst(integer_product, integers),
        },
        rounds=7,
    )
    return {
        "copy": 2 * big[0].nbytes / timings["copy"].us / 1e3,
        "read": big[0].nbytes / timings["read"].us / 1e3,
        "matmul": 2 * size**3 / timings["matmul"].us / 1e6,
        "matmul_int8": 2 * size**3 / timings["matmul_int8"].us / 1e6,
    }


@dataclass(frozen=True)
class Kernel:
    """A kernel or a copy that the profiler saw on a GPU, in nanoseconds from its first event."""

    name: str
    start: float
    end: float
    hlo: str | None  # the HLO instruction that it computes, if the trace names one


def traced_kernels(burst: Burst, repeats: int = 3) -> list[Kernel]:
    """Returns the kernels of `repeats` bursts in the order of their starts.

    Tracing adds time between kernels. Use it to see the parts of a launch, not to time launches.
    The result is empty if the profiler saw no GPU.
    """
    burst.run(1)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            burst.run(repeats)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(trace))
    found = []
    for plane in profile.planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        hlo = dict(event.stats).get("hlo_op")
                        end = event.start_ns + event.duration_ns
                        name = None if hlo is None else str(hlo)
                        found.append(Kernel(event.name, event.start_ns, end, name))
    return sorted(found, key=lambda kernel: (kernel.start, kernel.end))


def kernel_times(burst: Burst, repeats: int = 3) -> dict[str, list[float]]:
    """Returns the microseconds of each kernel of a burst, by name, as `traced_kernels` saw them."""
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in traced_kernels(burst, repeats):
        times[kernel.name].append((kernel.end - kernel.start) / 1e3)
    return dict(times)
