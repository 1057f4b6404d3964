"""Mosaic GPU's interpreter in tests: the races that it finds, and cheaper callbacks.

JAX puts the arguments of each callback on a device; the interpreter reads them back as integers and
NumPy arrays. A launch has some thousand of them. Without that way there and back an interpreted
test takes two thirds of the time.

The interpreter's own `gpu_callbacks.get_races()` knows of the last launch: of a decode kernel that
a merge follows, nothing. Tests take the fixture `races` and assert `not races.found`.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax._src import callback as jax_callback
from jax._src.pallas import fuser
from jax._src.pallas.mosaic.interpret import vector_clock
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import get_memory_space_idx
from jax.experimental.pallas import mosaic_gpu as plgpu

# JAX imports this with its first interpreted kernel. It adds an option to JAX's configuration, so
# that every program of the process is traced and compiled again: import it before the first one.
del fuser


def use_cheap_callbacks(monkeypatch: Any) -> None:
    """Gives callbacks their arguments as NumPy arrays, copied because XLA reuses their memory.

    The shapes of the interpreter's handles are made once in place of at each use, and its clocks
    are compared with fewer steps: they are some integers each, compared ten times per callback.
    """

    def io_callback(*args: Any, callback: Any, **_: Any) -> Any:
        return callback(*map(np.array, args))  # JAX makes arrays of the results

    def to_int(x: Any) -> Any:
        return x if isinstance(x, jax.core.Tracer) else int(x)

    def is_before(one: Any, other: Any) -> bool:
        return one.clock.tobytes() != other.clock.tobytes() and not np.count_nonzero(
            one.clock > other.clock
        )

    monkeypatch.setattr(jax_callback, "io_callback_impl", io_callback)
    monkeypatch.setattr(shared_memory, "_to_int", to_int)
    monkeypatch.setattr(vector_clock.NpVectorClock, "lt", is_before)
    for handle in (shared_memory.HostAllocationRequest, shared_memory.HostAllocationKey):
        once = functools.cache(handle.shape_and_dtype.__func__)
        monkeypatch.setattr(handle, "shape_and_dtype", classmethod(once))


class Races:
    """What the launches after it report.

    in_global: whether accesses of global memory are judged. Clusters run one after the other here,
    each on clocks of its own: what one reads of another looks like a race however it waited.
    """

    def __init__(self, monkeypatch: Any) -> None:
        self.in_global = True
        self._launches: list[Any] = []
        races, global_memory = self, get_memory_space_idx(plgpu.GMEM)

        class Launch(gpu_callbacks.GPURaceDetectionState):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                races._launches.append(self)

            def judges(self, key: Any) -> bool:
                return races.in_global or key.memory_space_id != global_memory

            def check_read(self, thread: Any, clock: Any, key: Any, *rest: Any, **options: Any):
                if self.judges(key):
                    super().check_read(thread, clock, key, *rest, **options)

            def check_write(self, thread: Any, clock: Any, key: Any, *rest: Any, **options: Any):
                if self.judges(key):
                    super().check_write(thread, clock, key, *rest, **options)

        monkeypatch.setattr(gpu_callbacks, "GPURaceDetectionState", Launch)

    @property
    def found(self) -> bool:
        """In any launch so far, of which there must be one."""
        assert self._launches
        return any(launch.races_found for launch in self._launches)
