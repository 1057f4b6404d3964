"""The table of what each implementation takes: every cell is an answer of the code.

`Implementation.lacks` is asked about devices, `Implementation.refuses` about problems. Problems are
shapes and dtypes without arrays, with the widths of DeepSeek-V3, and no GPU is needed.
"""

import functools
import itertools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tables_common import table

from mla_jax.cache import LAYOUTS, PAGE_SIZES, PagedKVCache
from mla_jax.implementations.implementation import Implementation
from mla_jax.problem import AttentionProblem
from mla_jax.quantize import GRANULARITIES
from mla_jax.registry import IMPLEMENTATIONS
from mla_jax.sharding.target import Target
from pallas_kernels.hopper.prefill.config import NOPE_DIMS, ROPE_DIMS, V_DIMS, PrefillConfig

FLOATS = ("float32", "bfloat16", "float16")
TOKENS = 4096  # that the block table of the one request reaches
MOST_ROWS = 1 << 20  # as good as any number of rows


def _gpu(capability: str) -> Target:
    device: Any = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    return Target("cuda", device)


DEVICES = {
    "CPU": Target("cpu"),
    "TPU": Target("tpu"),
    "NVIDIA Hopper (H100, H200)": _gpu("9.0"),
    "other NVIDIA GPU": _gpu("8.0"),
}


def problem(
    *, q: str = "bfloat16", dtype: str = "bfloat16", page_size: int = 64, layout: str = "ND",
    granularity: str | None = None, rows: int = 1,
) -> AttentionProblem:  # fmt: skip
    """One request of `rows` query rows whose block table reaches `TOKENS` tokens."""

    def abstract(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    return AttentionProblem(
        q=abstract(1, 1, rows, 576, dtype=q),
        cache=_cache(page_size, dtype, layout, granularity),
        block_tables=abstract(1, TOKENS // page_size),
        seq_lens=abstract(1),
        query_lens=None,
        plan=None,
        softmax_scale=0.1,
        causal=True,
        rescale="multiply",
        partial_dtype=None,
    )


@functools.cache
def _cache(page_size: int, dtype: str, layout: str, granularity: str | None) -> PagedKVCache:
    """A cache of one page, without arrays."""
    return jax.eval_shape(
        lambda: PagedKVCache.create(
            1, page_size=page_size, dtype=dtype, layout=layout, scale_granularity=granularity,
            scale=0.5 if granularity == "tensor" else None,
        )
    )  # fmt: skip


CACHES: dict[str, dict[str, Any]] = {
    **{dtype: {"dtype": dtype} for dtype in FLOATS},
    **{
        f"int8 with one scale per {granularity}": {"dtype": "int8", "granularity": granularity}
        for granularity in GRANULARITIES
    },
}


def takes(one: Implementation, cache: dict[str, Any]) -> tuple[str, ...] | None:
    """q's dtypes, page sizes, layouts and query rows for a kind of cache; None: it refuses it."""
    axes: dict[str, tuple[Any, ...]] = {"q": FLOATS, "page_size": PAGE_SIZES, "layout": LAYOUTS}
    accepted = [
        dict(zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
        if one.refuses(problem(**cache, **dict(zip(axes, values, strict=True)))) is None
    ]
    if not accepted:
        return None
    each = {axis: [v for v in axes[axis] if any(a[axis] == v for a in accepted)] for axis in axes}
    if len(accepted) != len(each["q"]) * len(each["page_size"]) * len(each["layout"]):
        raise ValueError(f"{one.name} takes no product of {axes} with {cache}: {accepted}")
    rows = _most(lambda n: one.refuses(problem(**cache, **accepted[0], rows=n)) is None)
    words = {axis: ", ".join(map(str, values)) for axis, values in each.items()}
    if words["q"] == cache["dtype"]:
        words["q"] = "as the cache"
    if len(each["q"]) == len(FLOATS):
        words["q"] = "any"
    return *words.values(), "any" if rows == MOST_ROWS else f"up to {rows:,}"


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number of rows that fits, up to MOST_ROWS."""
    low, high = 0, MOST_ROWS + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def devices(one: Implementation) -> str:
    """The names of the devices that it runs on."""
    found = [name for name, target in DEVICES.items() if one.lacks(target) is None]
    return "any" if len(found) == len(DEVICES) else ", ".join(found)


def support(_: Path) -> str:
    """What implementations take; those, and kinds of cache, that are treated alike share a line."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, one in IMPLEMENTATIONS.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for cache, options in CACHES.items():
            found = takes(one, options)
            if found is not None:
                alike.setdefault(found, []).append(cache)
        for found, caches in alike.items():
            kinds = "any" if len(caches) == len(CACHES) else ", ".join(caches)
            lines.setdefault((devices(one), kinds, *found), []).append(f"`{name}`")
    header = ["implementation", "device", "cache dtype", "q dtype", "page sizes", "layouts"]
    header += ["query rows per request"]
    rows = [[", ".join(names), *cells] for cells, names in lines.items()]
    return table(header, rows, words=len(header))


def prefill_widths(_: Path) -> str:
    """The widths that the Hopper prefill kernel takes, and its schedule for them."""
    rows = []
    for v_dim, nope_dim, rope_dim in itertools.product(V_DIMS, NOPE_DIMS, ROPE_DIMS):
        config = PrefillConfig.of_widths(nope_dim, rope_dim, v_dim)
        numbers = nope_dim, rope_dim, v_dim, config.block_keys, config.stages
        registers = " and ".join(map(str, config.registers))
        rows.append([*map(str, numbers), registers, f"{config.shared_memory_bytes:,}"])
    header = ["nope", "rope", "v", "keys per block", "stages", "registers"]
    header += ["bytes of shared memory"]
    return table(header, rows, words=0)
