"""The compiled programs of decode attention: the layers of a model, in bursts of launches.

Each layer has its own cache. Rows that differ only in their lengths share compiled programs, as the
steps of a server do.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from experiments.speed import timing
from experiments.speed.decode.bursts import LONG_BURST, estimated_seconds
from experiments.speed.decode.contenders import Contender
from experiments.speed.decode.pools import Pool, array_struct, cache_struct, reach
from experiments.speed.decode.setup import SCALE, Setup
from experiments.speed.shapes import Shape
from mla_jax import paged_mla_attention
from mla_jax.problem import AttentionProblem
from mla_jax.registry import IMPLEMENTATIONS

MOSAIC_CALLS = ("mosaic_gpu", "mosaic_gpu_v2")  # jax.export does not promise to keep these stable
SHORT_TABLE, MOST_IN_SHORT_TABLES = 4096, 16384  # tokens: per block table, and per batch


@dataclasses.dataclass(frozen=True)
class Work:
    """Rows that share programs, because they only differ in lengths; see `key`."""

    row: Shape  # any of the rows
    pool: Pool
    setup: Setup

    @property
    def q(self) -> jax.ShapeDtypeStruct:
        row = self.row
        return array_struct((row.batch, row.s_q, row.heads, self.setup.width), jnp.bfloat16)

    @property
    def tables(self) -> jax.ShapeDtypeStruct:
        return array_struct((self.row.batch, self.capacity // self.row.page_size), jnp.int32)

    @property
    def capacity(self) -> int:
        """Tokens per block table.

        A few short requests have short tables, as in a server that groups steps by length. Kernels
        select their tile sizes by it.
        """
        if self.setup.exact_tables:
            return reach(self.row)
        short = max(self.row.seq_lens) <= SHORT_TABLE
        short &= self.row.batch * SHORT_TABLE <= MOST_IN_SHORT_TABLES
        return min(SHORT_TABLE, self.pool.capacity) if short else self.pool.capacity

    @property
    def key(self) -> tuple:
        """What rows that share programs have in common."""
        return self.row.heads, self.row.s_q, self.row.page_size, self.capacity

    @property
    def seq_lens(self) -> jax.ShapeDtypeStruct:
        return array_struct((self.row.batch,), jnp.int32)

    def refuses(self, who: Contender) -> str | None:
        """Returns why `who` can't compute this, or None if it can."""
        name = who.implementation
        if name is None:
            return None if self.row.dtype == "bf16" else "it reads bf16"
        reason = IMPLEMENTATIONS[name].unavailable(None)
        if reason is not None:
            return reason
        try:
            cache = cache_struct(self.pool, self.row.page_size, self.setup)
        except (ValueError, TypeError) as error:
            return f"there is no such cache yet: {error}"
        options = dict(who.options)
        partial_dtype = options.get("partial_dtype")
        arrays: dict[str, Any] = {
            "q": self.q,
            "cache": cache,
            "block_tables": self.tables,
            "seq_lens": self.seq_lens,
            "query_lens": None,
        }
        problem = AttentionProblem(
            **arrays,
            plan=None,
            softmax_scale=SCALE,
            causal=True,
            rescale=options.get("rescale", "multiply"),
            partial_dtype=partial_dtype and jnp.dtype(partial_dtype),
        )
        return IMPLEMENTATIONS[name].unavailable(problem)

    def planner(self, who: Contender) -> Callable[[jax.Array], Any]:
        """Returns seq_lens -> the plan that `who` uses in one step; None for most."""
        if who.implementation != "hopper":
            return lambda seq_lens: None
        from pallas_kernels.hopper.planning import plan_decode

        rescale = dict(who.options).get("rescale", "multiply")
        rows, cache = self.row.s_q * self.row.heads, "int8" if self.row.dtype == "int8" else "float"
        return lambda seq_lens: plan_decode(
            seq_lens,
            rows,
            capacity=self.capacity,
            cache=cache,
            rescale=rescale,
            kv_lora_rank=self.setup.kv_lora_rank,
            rope_dim=self.setup.rope_dim,
            tiles=who.tiles,
        )

    def step(self, who: Contender) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """Returns (q, layer, (block tables, seq_lens, plan)) -> (o, lse)."""
        struct = cache_struct(self.pool, self.row.page_size, self.setup)

        def step(q: jax.Array, layer: Mapping[str, jax.Array], shared: tuple) -> tuple:
            tables, seq_lens, plan = shared
            fields: dict[str, Any] = {
                name: flat.reshape(getattr(struct, name).shape) for name, flat in layer.items()
            }
            cache = dataclasses.replace(struct, **fields)
            return paged_mla_attention(
                q, cache, tables, seq_lens, softmax_scale=SCALE, plan=plan, **dict(who.options)
            )

        return step

    def passes(self, rows: Iterable[Shape], layers: int) -> int:
        """Returns how often a program runs all layers: `launches` times if they are short."""
        longest = max(estimated_seconds(row, self.setup) for row in rows)
        launches = min(self.setup.launches, LONG_BURST / longest)
        return max(1, round(launches / layers))

    def lower(self, who: Contender) -> "Lowered":
        """Traces and lowers a plan and a step, which is the part that runs in Python."""
        plan = jax.jit(self.planner(who))
        shared = self.tables, self.seq_lens, jax.eval_shape(plan, self.seq_lens)
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in MOSAIC_CALLS]

        def exported(function: Any, *arguments: Any) -> bytes:
            return bytes(export.export(function, disabled_checks=checks)(*arguments).serialize())

        layer = self.pool.structs(self.setup)
        step = exported(jax.jit(self.step(who)), self.q, layer, shared)
        return Lowered(exported(plan, self.seq_lens), step)

    def compile(
        self, who: Contender, rows: Sequence[Shape], lowered: "Lowered | None" = None
    ) -> "Programs":
        """Compiles the programs; takes seconds, most of them outside Python, so use threads.

        lowered: of this work and contender; None: it is made here.
        """
        lowered = lowered or self.lower(who)
        count = min(self.pool.layers, who.most_layers or self.pool.layers)
        layers = [self.pool.structs(self.setup)] * count
        # An exported kernel is lowered once for all bursts.
        plan, step = (
            export.deserialize(bytearray(one)).call for one in (lowered.plan, lowered.step)
        )
        shared = self.tables, self.seq_lens, jax.eval_shape(plan, self.seq_lens)
        passes = 1 if who.most_layers else self.passes(rows, count)
        modes = {"us": False, "us_separated": True} if who.separated else {"us": False}
        return Programs(
            count,
            jax.jit(plan).lower(self.seq_lens).compile(),
            {
                column: timing.compile_model(
                    step, self.q, layers, shared, passes=passes, separated=separated
                )
                for column, separated in modes.items()
            },
        )


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A plan and a step of one layer, exported and serialized, for the kind of device here."""

    plan: bytes
    step: bytes


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled plan and the compiled bursts on so many layers, by the column of their time."""

    layers: int
    plan: Callable[[jax.Array], Any]
    bursts: dict[str, timing.ModelProgram]
