"""Races that Mosaic GPU's interpreter finds, in every launch of a test.

Its own `gpu_callbacks.get_races()` knows of the last launch: of a decode kernel that a merge
follows, nothing. Tests take the fixture `races` and assert `not races.found`.
"""

from typing import Any

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import get_memory_space_idx
from jax.experimental.pallas import mosaic_gpu as plgpu


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
