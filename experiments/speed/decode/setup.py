"""The limits of a machine and a run of decode benchmarks, `Setup`."""

import dataclasses
from typing import Any

import jax

from experiments.speed import timing

SCALE = 192**-0.5  # softmax scale of DeepSeek-V2 and V3


@dataclasses.dataclass(frozen=True)
class Setup:
    """The limits of this machine and run."""

    memory: int  # bytes for caches
    kv_lora_rank: int = 512
    rope_dim: int = 64
    rotate: int = 4 * timing.L2_BYTES  # bytes of KV read between two launches of a layer
    min_layers: int = 4
    usual_layers: int = 12
    max_layers: int = 128
    launches: int = 48  # per program, approximately
    rounds: int = 7
    page_rounds: int = 45  # for comparing page sizes, which differ by a few percent
    pause: float = 0.03
    seed: int = 0
    exact_tables: bool = False  # whether a row's block tables reach no further than its requests

    @property
    def widths(self) -> tuple[int, int]:
        """(kv_lora_rank, rope_dim), as stored in sessions."""
        return self.kv_lora_rank, self.rope_dim

    @property
    def width(self) -> int:
        """D, the values per token."""
        return self.kv_lora_rank + self.rope_dim

    def token_bytes(self, dtype: str) -> int:
        """Returns bytes per token and layer; int8 has a float32 scale and a bf16 rope part."""
        return self.kv_lora_rank + 2 * self.rope_dim + 4 if dtype == "int8" else 2 * self.width

    @staticmethod
    def here(memory_gib: float, kv_lora_rank: int, rope_dim: int, seed: int) -> "Setup":
        """Returns the setup of the default device.

        memory_gib: memory for caches; 0 is 60 % of the device's, or 2 GiB on a CPU.
        """
        statistics = jax.devices()[0].memory_stats() or {}
        limit = int(0.6 * statistics["bytes_limit"]) if "bytes_limit" in statistics else 2 << 30
        memory = int(memory_gib * 2**30) or limit
        setup = Setup(memory, kv_lora_rank, rope_dim, seed=seed)
        if jax.default_backend() == "cpu":
            few: dict[str, Any] = {"min_layers": 2, "usual_layers": 2, "max_layers": 2}
            return dataclasses.replace(setup, **few, launches=2, rounds=3, page_rounds=3, pause=0.0)
        return setup
