"""Combines partials in a launch of its own.

This launch runs where the workers of a decode launch may not all be resident at the same time, so
that they can't wait for each other: for plans with more workers than the GPU has SMs. It also runs
in the interpreter, which has no atomics.
"""

from typing import Any

from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.splits.plan import SplitPlan
from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.parts.combine import (
    CombineRefs,
    OutputRows,
    combine_shares,
    divide_into_columns,
    divide_into_rows,
)
from pallas_kernels.hopper.work_items import WorkList, range_of

WARPGROUPS = 4  # per CTA


def merge(
    o_ref: Any,
    lse_ref: Any,
    partials: tuple[Any, ...],
    plan: SplitPlan,
    work: WorkList,
    *,
    num_rows: int,
    interpret: Any = None,
) -> None:
    """Writes combined rows to o_ref [B, R, d_v] and lse_ref [B, R], in place.

    Args:
        o_ref: the output. It keeps the rows of tiles that are not split.
        lse_ref: the natural log-sum-exp of each row, likewise.
        partials: as a decode kernel returns them: o of any float dtype, lse, and scales if it has
            any.
        plan: the split plan that the partials belong to.
        work: the plan's `work_list`. Tiles whose results a worker keeps are already combined.
        num_rows: rows per request. An output may have more rows, which are not written.
        interpret: as in `attention.attend`.
    """
    g = Backend(interpreting=interpret is not None)
    width = o_ref.shape[2]
    partial_o, partial_lse = partials[:2]
    in_blocks = partial_o.ndim == 4
    ctas = partial_o.shape[1] if in_blocks else 1
    rows = partial_lse.shape[1] // ctas
    if in_blocks:
        divisions = divide_into_columns(g, plan, width, WARPGROUPS)
    else:
        divisions = divide_into_rows(g, plan, rows, width, WARPGROUPS)

    def body(partial_o_ref, partial_lse_ref, *rest):
        *scales_ref, ranges_ref, items_ref, o_ref, lse_ref = rest
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        worker, cta = lax.axis_index("worker"), lax.axis_index("cta")

        def place(request, row_tile):
            first = (row_tile * ctas + cta) * rows
            tile_rows = Rows.of_tile(
                request, first, rows, total=num_rows, rows_per_tile=plan.rows_per_tile
            )
            return OutputRows(tile_rows, cta)

        combine_shares(
            divisions,
            CombineRefs(partial_o_ref, partial_lse_ref, o_ref, lse_ref, *scales_ref),
            items_ref,
            range_of(ranges_ref.at[worker]),
            counter_of=lambda *_: None,
            place=place,
            warpgroup=lax.axis_index("wg"),
            warpgroups=WARPGROUPS,
        )

    plgpu.kernel(
        body,
        out_type=(),
        grid=(len(work.ranges), ctas),
        grid_names=("worker", "cta"),
        num_threads=WARPGROUPS,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="mla_merge",
    )(*partials, work.ranges, work.items, o_ref, lse_ref)
