"""What is static in a call: shapes, dtypes, options. Each case is one compilation."""

import dataclasses
from typing import Any

import numpy as np

PLAIN = ("reference", "xla", "split_kv", "blockwise")
INTERPRETED = "interpreted"  # the Hopper kernels, by Mosaic GPU's interpreter
FLOATS = ("float32", "bfloat16", "float16")
GRANULARITIES = ("token", "group", "tensor")
PAGE_SIZES = (1, 16, 64, 128)
WIDTHS = ((512, 64),)  # kv_lora_rank, rope_dim: DeepSeek's
OTHER_WIDTHS = ((128, 64), (256, 64), (384, 64), (384, 128), (256, 192))  # that the kernels take
PLAIN_WIDTHS = ((32, 16), (128, 32), (48, 8))
BLOCK = 64  # tokens of a block of the Hopper kernels
# The tile heights of the Hopper kernels: by the kind of the cache, and with exponent_add.
HEIGHTS = {
    "float": (8, 16, 24, 32, 64, 128),
    "int8": (8, 16, 24, 32, 64),
    "exponent_add": (64, 128),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest sizes that are drawn."""

    batch: int
    tokens: int
    heads: int
    longest: int  # keys of a request
    scores: int  # requests * rows * longest: the time of the reference
    cached: int  # tokens of the cache: its memory
    reach: int  # tokens of a block table that is longer than needed


# A call of the largest sizes takes an H200 some 50 ms and 3 GB, most of both for the reference.
GPU = Limits(20, 6, 130, 16384, 100_000_000, 65536, 1 << 17)
CPU = Limits(4, 4, 20, 320, 100_000, 640, 512)
INTERPRETER = Limits(2, 3, 130, 192, 100_000, 400, 256)


@dataclasses.dataclass(frozen=True)
class Case:
    """Static arguments of one call."""

    implementation: str
    batch: int
    tokens: int  # S, of q
    heads: int
    rank: int
    rope: int
    page_size: int
    max_pages: int
    num_pages: int
    longest: int  # keys that a request with valid lengths has at most
    q_dtype: str
    cache_dtype: str
    granularity: str | None
    layout: str
    rescale: str
    partial_dtype: str | None
    causal: bool
    return_lse: bool
    ragged: bool  # whether query_lens is given
    plan: str  # "none", "splits", "fixed" or "decode" (the kernels' own planner, called before)
    workers: int
    rows_per_tile: int
    block_size: int
    split_size: int
    in_pairs: bool
    softmax_scale: float
    q_in_parts: bool = False  # whether q is a pair of arrays, latent and rope
    packed: bool = False  # whether the tokens are packed, with cu_q_lens
    num_layers: int = 1  # of the pool whose layer the cache is; 1: it is no pool

    @property
    def rows(self) -> int:
        """R, query rows of a request."""
        return self.tokens * self.heads

    @property
    def capacity(self) -> int:
        """Tokens that a block table reaches."""
        return self.max_pages * self.page_size

    @property
    def width(self) -> int:
        """D, values of a query row and of a token."""
        return self.rank + self.rope

    @property
    def kind(self) -> str:
        """The kind of the cache: "float" or "int8"."""
        return "int8" if self.cache_dtype == "int8" else "float"

    @property
    def label(self) -> str:
        """By which calls are counted."""
        stored = f"int8 per {self.granularity}" if self.kind == "int8" else self.cache_dtype
        return f"{self.implementation}, {stored}"

    def __str__(self) -> str:
        plan = self.plan
        if plan in ("splits", "fixed"):
            plan += f"({self.workers} workers, {self.rows_per_tile} rows, blocks of "
            plan += f"{self.block_size}" + (", in pairs)" if self.in_pairs else ")")
        words = [
            self.label,
            f"q {self.q_dtype} [{self.batch}, {self.tokens}, {self.heads}]",
            f"widths {self.rank}+{self.rope}",
            f"{self.num_pages} pages of {self.page_size} {self.layout}, {self.max_pages} a table",
            f"longest {self.longest}",
            self.rescale,
            f"partials {self.partial_dtype}",
            "causal" if self.causal else "not causal",
            "packed" if self.packed else "ragged" if self.ragged else "all tokens",
            f"plan {plan}",
        ]
        words += ["q in parts"] if self.q_in_parts else []
        words += [f"{self.num_layers} layers"] if self.num_layers > 1 else []
        return ", ".join(words)


def draw_case(rng: np.random.Generator, implementation: str, limits: Limits, **fixed: Any) -> Case:
    """A random case that the implementation takes.

    fixed: fields of the case that are given, `rows_per_tile` by a plan; of sizes only batch,
    tokens, heads and page_size, since others hang on these.
    """
    kernel = implementation in ("hopper", INTERPRETED)
    cache_dtype = fixed.get("cache_dtype") or _dtype(rng, implementation)
    int8 = cache_dtype == "int8"
    tokens, heads = _rows(rng, limits, int(fixed.get("rows_per_tile", 0)))
    layout, granularity, page_size = "ND", None, int(rng.choice(PAGE_SIZES))
    widths = WIDTHS if rng.random() < 0.8 else OTHER_WIDTHS
    if int8:
        granularity, page_size, widths = "token", int(rng.choice((64, 128))), WIDTHS
    q_dtype = "bfloat16" if int8 else cache_dtype
    if not kernel:
        layout = str(rng.choice(("ND", "NZ")))
        page_size = int(rng.choice(PAGE_SIZES))
        widths = PLAIN_WIDTHS if rng.random() < 0.8 else WIDTHS
        q_dtype = str(rng.choice(FLOATS)) if rng.random() < 0.3 else q_dtype
        if int8:
            folded = ("token", "tensor")  # those that blockwise can multiply into P
            offered = folded if implementation == "blockwise" else GRANULARITIES
            granularity = str(rng.choice(offered))
            widths = ((256, 16),) if granularity == "group" else widths
    rank, rope = widths[rng.integers(len(widths))]
    page_size = int(fixed.get("page_size", page_size))
    tokens, heads = int(fixed.get("tokens", tokens)), int(fixed.get("heads", heads))
    if rank % 32 or rope % 16:  # rows of NZ are multiples of 32 bytes
        layout = "ND"
    multiplies = int8 and (kernel or implementation == "blockwise")
    rescale = "exponent_add" if rng.random() < 0.25 and not multiplies else "multiply"
    rescale = fixed.get("rescale", rescale)

    # Requests, and keys that they may have: as many as the reference has time for.
    longest = int(BLOCK * (limits.longest / BLOCK) ** rng.random())
    longest = max(16, min(longest, limits.scores // (tokens * heads)))
    batch = int(fixed.get("batch", rng.integers(1, limits.batch + 1)))
    batch = max(1, min(batch, limits.scores // (tokens * heads * longest)))
    max_pages = -(-longest // page_size)
    if rng.random() < 0.6:  # lengths reach the end of the table; else it is longer than needed
        longest = max_pages * page_size
    else:
        max_pages += 1 + int(rng.integers(max(1, limits.reach // page_size)))
    wanted = batch * -(-longest // page_size) + int(rng.integers(1, 4))
    num_pages = min(wanted, max(limits.cached // page_size, 2))
    plan = _plan(rng, implementation, longest)
    if "rows_per_tile" in fixed and plan["plan"] not in ("splits", "fixed"):
        plan["plan"] = "splits"
    options = {
        "rescale": rescale,
        "partial_dtype": _chosen(rng, (None, None, *FLOATS)),
        "causal": bool(rng.random() < 0.75),
        "return_lse": bool(rng.random() < 0.9),
        "ragged": bool(rng.random() < 0.7),
        "softmax_scale": float(rng.choice((192**-0.5, 0.2, 576**-0.5))),
    }
    if kernel:
        heights = HEIGHTS[
            "exponent_add" if rescale == "exponent_add" else "int8" if int8 else "float"
        ]
        if plan["rows_per_tile"] not in heights:
            plan["rows_per_tile"] = int(rng.choice(heights))
        plan["block_size"] = BLOCK
    shape = {
        "implementation": implementation, "batch": batch, "tokens": tokens, "heads": heads,
        "rank": rank, "rope": rope, "page_size": page_size, "max_pages": max_pages,
        "num_pages": num_pages, "longest": longest, "q_dtype": q_dtype,
        "cache_dtype": cache_dtype, "granularity": granularity, "layout": layout,
    }  # fmt: skip
    case = Case(**{**shape, **options, **plan, **fixed})
    return dataclasses.replace(case, **(_forms(rng, case) | fixed))


def _forms(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    """The forms of the arrays; the interpreted kernels have no packed tokens or pools."""
    forms: dict[str, Any] = {"q_in_parts": bool(rng.random() < 0.3)}
    if case.implementation != INTERPRETED:
        forms["packed"] = bool(rng.random() < 0.5) and case.ragged and case.plan == "none"
        is_pool = bool(rng.random() < 0.25) and case.granularity != "tensor"
        forms["num_layers"] = int(rng.integers(2, 5)) if is_pool else 1
    return forms


def _dtype(rng: np.random.Generator, implementation: str) -> str:
    if implementation in ("hopper", INTERPRETED):
        return str(rng.choice(("bfloat16", "float16", "int8"), p=(0.45, 0.25, 0.3)))
    return str(rng.choice((*FLOATS, "int8")))


def _rows(rng: np.random.Generator, limits: Limits, rows_per_tile: int) -> tuple[int, int]:
    """Tokens and heads; their product is often near a multiple of what tiles are made of.

    rows_per_tile: where it is fixed (0: it is not), rows of at most a tile and a half.
    """
    tokens = int(rng.integers(1, limits.tokens + 1)) if rng.random() < 0.6 else 1
    most_heads = limits.heads
    if rows_per_tile:
        most_heads = max(1, min(most_heads, 3 * rows_per_tile // 2 // tokens))
    if rng.random() < 0.35:
        return tokens, int(rng.integers(1, most_heads + 1))
    unit = int(rng.choice((8, 16, 32, 64, 128)))
    unit = max(unit, rows_per_tile // 2)
    most = max(1, min(6, tokens * most_heads // unit))
    rows = unit * int(rng.integers(1, most + 1)) + int(rng.choice((-1, 0, 1, unit // 2)))
    return tokens, min(max(1, round(rows / tokens)), most_heads)


def _plan(rng: np.random.Generator, implementation: str, longest: int) -> dict[str, object]:
    plans = {
        "hopper": ("none", "none", "none", "decode", "splits", "splits", "fixed"),
        INTERPRETED: ("splits", "splits", "fixed"),  # the others are for 132 CTAs: too many here
        "split_kv": ("none", "splits", "fixed"),
    }.get(implementation, ("none",))
    heights = (8, 16, 24, 32, 64, 128) if implementation != "split_kv" else (1, 5, 16, 64)
    block = BLOCK if implementation != "split_kv" else int(rng.choice((16, 32, 64)))
    most_workers = 300 if implementation == "hopper" else 4
    workers = int(rng.integers(1, most_workers + 1))
    in_pairs = bool(rng.random() < 0.3) and workers % 2 == 0
    return {
        "plan": str(rng.choice(plans)),
        "workers": workers,
        "rows_per_tile": int(rng.choice(heights)),
        "block_size": block,
        # 32 pieces at most, whose partial outputs there is memory for.
        "split_size": block * -(-longest // (block * int(rng.integers(1, 33)))),
        "in_pairs": in_pairs,
    }


def _chosen(rng: np.random.Generator, options: tuple[str | None, ...]) -> str | None:
    return options[rng.integers(len(options))]
