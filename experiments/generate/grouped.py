"""Grouped products: rows that are sorted by expert, times the matrix of their expert.

`jax.lax.ragged_dot` computes them anywhere. With jax 0.11.2 it is a product of all rows with all
experts on a CPU and on an NVIDIA GPU: XLA copies the rows once per expert, with zeros in place of
the rows of the others. With 64 experts that is 64 times the work.

On a Hopper GPU a Pallas kernel computes the product instead. It reads only the experts that have
rows. Every matrix is read once if no expert has more than 64 rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import device

ALIGN = 8  # an expert's rows begin at multiples of so many, which TMA needs for a tiled copy
TILE_ROWS = 64  # of a wgmma
TILE_COLUMNS = 128
TILE_DEPTH = 64  # values of the contraction per stage
STAGES = 6


def num_rows(pairs: int, num_experts: int) -> int:
    """Returns how many rows hold `pairs` rows of experts that are aligned, and a tile's slack."""
    most = pairs + (ALIGN - 1) * min(num_experts, pairs)
    return -(-most // ALIGN) * ALIGN + TILE_ROWS


def sums_before(values: jax.Array) -> jax.Array:
    """Returns the sum of all earlier values, [E] -> [E].

    XLA computes `jnp.cumsum` on a GPU by windows, which lose the name of the part that they are in.
    """
    index = jnp.arange(len(values))
    return jnp.where(index < index[:, None], values, 0).sum(1, dtype=values.dtype)


def grouped_product(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> Any:
    """Multiplies rows by the matrices of experts.

    Args:
        x: [R, K]. The rows of expert 0 come first, then those of expert 1, and so on.
        weights: [E, K, M].
        sizes: [E] int32, rows per expert, multiples of ALIGN.

    Returns:
        [R, M] of x.dtype. Rows after the last expert's have no defined value.
    """
    if device.card() is not None and takes(x, weights):
        return hopper_product(x, weights, sizes, num_sms=device.num_sms())
    precision = "highest" if x.dtype == jnp.float32 else None
    return jax.lax.ragged_dot(x, weights, sizes, precision=precision)


def takes(x: jax.Array, weights: jax.Array) -> bool:
    """Whether the Hopper kernel takes arrays of these shapes and dtypes."""
    _, depth, columns = weights.shape
    return (
        x.dtype == weights.dtype
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and depth % TILE_DEPTH == 0
        and columns % TILE_COLUMNS == 0
    )


def hopper_product(
    x: jax.Array, weights: jax.Array, sizes: jax.Array, *, num_sms: int, interpret: Any = None
) -> jax.Array:
    """Computes `grouped_product` with the kernel, which has one CTA per SM.

    A work item is a tile of an expert's rows and a block of columns. CTAs take turns at them.

    interpret: `plgpu.InterpretGPUParams()` runs the kernel on a CPU; None: on the GPU.
    """
    (rows, depth), (experts, _, columns) = x.shape, weights.shape
    num_tiles = -(-rows // TILE_ROWS) + min(experts, rows // ALIGN)
    blocks = columns // TILE_COLUMNS
    options = {} if interpret is None else {"interpret": interpret}

    def body(
        expert_ref: Any, start_ref: Any, count_ref: Any, x_ref: Any, w_ref: Any, out_ref: Any
    ) -> None:
        @plgpu.nd_loop((num_tiles * blocks,), collective_axes="sm")
        def _(loop: Any) -> None:
            tile = jax.lax.div(loop.index[0], jnp.int32(blocks))
            block = jax.lax.rem(loop.index[0], jnp.int32(blocks))
            count = count_ref[tile]

            @pl.when(count > 0)
            def _() -> None:
                start = pl.multiple_of(start_ref[tile], ALIGN)
                matrix = w_ref.at[expert_ref[tile]]
                acc = _tile_product(x_ref.at[pl.ds(start, TILE_ROWS)], matrix, block, depth)
                _store(acc, count, out_ref, start, block)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid=(num_sms,),
        grid_names=("sm",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **options,
    )
    return kernel(*_tiles(sizes, num_tiles), x, weights)


def _tiles(sizes: jax.Array, num_tiles: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns expert, first row and rows of each tile, [num_tiles] int32; 0 rows: no tile."""
    of_expert = -(-sizes // TILE_ROWS)
    before = sums_before(of_expert)
    ends = before + of_expert
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    expert = (ends <= tile[:, None]).sum(1, dtype=jnp.int32)
    expert = jnp.minimum(expert, len(sizes) - 1)
    within = (tile - before[expert]) * TILE_ROWS
    start = sums_before(sizes)[expert] + within
    count = jnp.where(tile < ends[-1], jnp.clip(sizes[expert] - within, 0, TILE_ROWS), 0)
    start = jnp.where(count > 0, start, 0)
    return expert, start, count


def _tile_product(x_ref: Any, w_ref: Any, block: Any, depth: int) -> Any:
    """Returns rows [TILE_ROWS, depth] times a block of columns of a matrix, in registers."""

    def products(acc: Any) -> Any:
        plgpu.emit_pipeline(
            lambda _, x_smem, w_smem: plgpu.wgmma(acc, x_smem, w_smem),
            grid=(depth // TILE_DEPTH,),
            in_specs=[
                plgpu.BlockSpec((TILE_ROWS, TILE_DEPTH), lambda k: (0, k), delay_release=1),
                plgpu.BlockSpec((TILE_DEPTH, TILE_COLUMNS), lambda k: (k, block), delay_release=1),
            ],
            max_concurrent_steps=min(STAGES, depth // TILE_DEPTH),
        )(x_ref, w_ref)
        return acc[...]

    return pl.run_scoped(products, plgpu.ACC((TILE_ROWS, TILE_COLUMNS)))


def _store(acc: Any, count: Any, out_ref: Any, start: Any, block: Any) -> None:
    """Stores the first `count` rows, a multiple of ALIGN; the rows after them are of others.

    A TMA store has a static size, so there is one for each bit of `count`.
    """

    @functools.partial(pl.run_scoped, smem=plgpu.SMEM(acc.shape, dtype=out_ref.dtype))
    def _(smem: Any) -> None:
        smem[...] = acc.astype(smem.dtype)
        plgpu.commit_smem()
        size = TILE_ROWS
        while size >= ALIGN:
            first = pl.multiple_of(count & ~(2 * size - 1), ALIGN)
            columns = pl.ds(block * TILE_COLUMNS, TILE_COLUMNS)

            @pl.when(count & size != 0)
            def _(size: int = size, first: Any = first, columns: Any = columns) -> None:
                rows = pl.ds(pl.multiple_of(start + first, ALIGN), size)
                plgpu.copy_smem_to_gmem(smem.at[pl.ds(first, size)], out_ref.at[rows, columns])

            size //= 2
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
