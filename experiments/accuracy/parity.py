"""Compares a checkpoint's attention layer with the outputs of another library, in four ways.

DIR/golden.npz holds x and out, both [batch, seq, hidden], causal from position 0.
tools/make_golden.py makes one with Hugging Face transformers.
"""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework.console import show_table
from experiments.framework.errors import relative_error
from experiments.framework.experiment import InputError, Outcome, Output, Row, reading
from experiments.framework.implementations import require_runs
from experiments.framework.options import flag
from mla_jax.cache import LAYOUTS, PAGE_SIZES, PagedKVCache
from mla_jax.checkpoints.load import load_hf
from mla_jax.checkpoints.weights import MLAParams
from mla_jax.config import MLAConfig
from mla_jax.layer import mla_layer
from mla_jax.reference.naive import naive_mla_layer
from mla_jax.registry import IMPLEMENTATIONS

SUMMARY = "a checkpoint's layer, four ways, compared with the golden.npz in its folder"


@dataclasses.dataclass(frozen=True)
class Options:
    checkpoint: str | None = flag(None, "folder: config.json, safetensors, golden.npz; required")
    layer: int | None = flag(
        None, "number of the layer in the checkpoint; by default the lowest", lower_bound=0
    )
    tolerance: float = flag(2e-5, "on each relative Frobenius error, float32", lower_bound=0)
    chunk: int = flag(7, "tokens per step in the way `chunked`", lower_bound=1)
    page_size: int = flag(16, "tokens per page of the cache", choices=PAGE_SIZES)
    layout: str = flag("ND", "of the pages", choices=LAYOUTS)
    implementation: str | None = flag(
        None, "of the attention; by default the best here", choices=tuple(IMPLEMENTATIONS)
    )


def run(options: Options, output: Output) -> Outcome:
    if options.checkpoint is None:
        raise InputError("--checkpoint must be given")
    require_runs(options.implementation)
    with reading("checkpoint"):
        config, params = load_hf(options.checkpoint, layer=options.layer)
    x, out = read_golden(Path(options.checkpoint), config)

    errors = {way: relative_error(got, out) for way, got in outputs(options, config, params, x)}
    rows: list[Row] = [
        {
            "way": way,
            "error": error,
            "tolerance": options.tolerance,
            "passed": error <= options.tolerance,
        }
        for way, error in errors.items()
    ]
    show_table(f"{options.checkpoint}: relative error against golden.npz", rows)
    passed = all(row["passed"] for row in rows)
    return Outcome(
        passed=passed,
        summary=(
            f"The largest relative error of the four ways is {np.max(list(errors.values())):.2e}, "
            f"{'within' if passed else 'ABOVE'} the tolerance of {options.tolerance:.0e}."
        ),
        rows=rows,
        headline={"errors": errors},
    )


def outputs(options: Options, config: MLAConfig, params: MLAParams, x: jax.Array) -> Any:
    """Yields (way, out [batch, seq, hidden]) for each way of computing the layer."""
    yield "naive", jax.jit(naive_mla_layer, static_argnums=1)(params, config, x)
    yield "absorbed", feed(options, config, params, x, chunk=x.shape[1])
    yield "chunked", feed(options, config, params, x, chunk=min(options.chunk, x.shape[1]))
    yield "token_by_token", feed(options, config, params, x, chunk=1)


def feed(
    options: Options, config: MLAConfig, params: MLAParams, x: jax.Array, *, chunk: int
) -> np.ndarray:
    """Computes the layer over the paged cache, in steps of `chunk` tokens.

    x and the output are [batch, seq, hidden].
    """
    batch, length, _ = x.shape
    pages = -(-length // options.page_size)
    with reading("layout"):
        cache = PagedKVCache.create(
            batch * pages,
            page_size=options.page_size,
            kv_lora_rank=config.kv_lora_rank,
            rope_dim=config.qk_rope_head_dim,
            dtype=x.dtype,
            layout=options.layout,
        )
    block_tables = jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages)
    step = jax.jit(mla_layer, static_argnames=("config", "implementation"), donate_argnames="cache")
    parts = []
    for start in range(0, length, chunk):
        count = min(chunk, length - start)
        tokens = jnp.pad(x[:, start : start + count], ((0, 0), (0, chunk - count), (0, 0)))
        part, cache = step(
            params,
            config=config,
            x=tokens,
            cache=cache,
            block_tables=block_tables,
            seq_lens=jnp.full(batch, start + count, jnp.int32),
            query_lens=jnp.full(batch, count, jnp.int32),
            implementation=options.implementation,
        )
        parts.append(np.asarray(part[:, :count]))
    return np.concatenate(parts, axis=1)


def read_golden(folder: Path, config: MLAConfig) -> tuple[jax.Array, np.ndarray]:
    """Reads (x, out) of golden.npz, both [batch, seq, hidden]; raises InputError if it can't."""
    path = folder / "golden.npz"
    try:
        with np.load(path) as file:
            x, out = (np.asarray(file[name], np.float32) for name in ("x", "out"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"--checkpoint: can't read x and out from {path}: {error}") from error
    for name, value in (("x", x), ("out", out)):
        if value.ndim != 3 or value.shape[2] != config.hidden_size or value.size == 0:
            wanted = f"[batch, seq, {config.hidden_size}]"
            raise InputError(f"--checkpoint: {name} in {path} must be {wanted}, got {value.shape}")
    if x.shape != out.shape:
        raise InputError(f"--checkpoint: {path}: x is {x.shape}, but out is {out.shape}")
    return jnp.asarray(x), out
