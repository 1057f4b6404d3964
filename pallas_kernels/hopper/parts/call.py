"""One launch of a decode kernel: what it reads, what it writes, and its options."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mla_jax.splits.plan import SplitPlan
from pallas_kernels.hopper.config import KernelConfig
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.parts.query_parts import QueryParts
from pallas_kernels.hopper.work_items import LOG2E, WorkList, valid_lengths


class Requests(NamedTuple):
    """What every decode kernel reads of the requests: arrays outside, refs inside a kernel."""

    block_tables: Any  # [B, max_pages] int32
    seq_lens: Any  # [B] int32
    query_lens: Any | None  # [B] int32; None: every request has all of its query tokens
    work: WorkList


class Outputs(NamedTuple):
    """What every decode kernel writes: references that live outside of the launch."""

    o: Any  # [B, R, kv_lora_rank] of q's dtype
    lse: Any  # [B, R] float32, natural log


@dataclasses.dataclass(frozen=True)
class DecodeCall[Config: KernelConfig]:
    """Attention of R = num_queries * num_heads rows per request over a paged latent cache.

    Attributes:
        q: of R or more rows; those past R are padding.
        cache: the cache's arrays: (pages,), or (pages, rope_pages, scales) with an int8 latent.
        num_queries: query tokens per request.
        config: the kernel's own.
        combines: whether the launch itself combines split tiles. Its CTAs then wait for each other,
            so all of them have to run at the same time.
        partial_dtype: of the partial o of split tiles.
        exponent_add: whether O is rescaled by AMLA's integer add, or else by multiplication.
        stamps: int32 ref of shape `stamps.shape` for the kernel's time stamps; None: no stamps.
        interpret: `plgpu.InterpretGPUParams()` runs the kernel on a CPU; None: on the GPU.
    """

    q: QueryParts
    cache: tuple[jax.Array, ...]
    requests: Requests
    outputs: Outputs
    plan: SplitPlan
    num_heads: int
    num_queries: int
    kv_lora_rank: int
    softmax_scale: float
    causal: bool
    config: Config
    combines: bool
    partial_dtype: Any
    exponent_add: bool = False
    stamps: Any = None
    interpret: Any = None

    @property
    def num_rows(self) -> int:
        """R."""
        return self.num_queries * self.num_heads

    @property
    def rope_dim(self) -> int:
        return self.q.width - self.kv_lora_rank

    @property
    def page_size(self) -> int:
        return self.cache[0].shape[1]

    @property
    def num_partials(self) -> int:
        """Partial results that the launch has room for, at least one: no array is empty."""
        return max(1, self.plan.num_partials)

    @property
    def log2_scale(self) -> float:
        """Scores times this are in log2 units."""
        return self.softmax_scale * LOG2E

    @property
    def interpreting(self) -> bool:
        return self.interpret is not None

    def lengths(self, requests: Requests, request: Any) -> tuple[Any, Any]:
        """Returns (kv length, query length) of a request; a kv length of -1 where invalid."""
        capacity = self.requests.block_tables.shape[1] * self.page_size
        return valid_lengths(
            requests.seq_lens,
            requests.query_lens,
            request,
            capacity=capacity,
            num_queries=self.num_queries,
        )

    def rows_of(self, request: Any, first: Any, height: int) -> Rows:
        """Returns rows first .. first + height of a request in the outputs."""
        return Rows.of_tile(
            request, first, height, total=self.num_rows, rows_per_tile=self.plan.rows_per_tile
        )


def float_struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an output."""
    return jax.ShapeDtypeStruct(shape, dtype)
