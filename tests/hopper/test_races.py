"""The detector of tests/support/races.py, on kernels that race and kernels that don't."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def launch(x, *, shared: bool, waits: bool):
    """Warpgroup 0 writes 128 numbers, warpgroup 1 reads them: from shared or global memory."""

    def body(x_ref, o_ref, scratch, written):
        wg = jax.lax.axis_index("wg")
        middle = scratch if shared else o_ref.at[0]

        @pl.when(wg == 0)
        def _write():
            middle[...] = x_ref[...]
            plgpu.barrier_arrive(written)

        @pl.when(wg == 1)
        def _read():
            if waits:
                plgpu.barrier_wait(written)
            o_ref.at[1][...] = middle[...]

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((2, 128), jnp.float32),
        scratch_types=(plgpu.SMEM((128,), jnp.float32), plgpu.Barrier(num_arrivals=1)),
        num_threads=2,
        thread_name="wg",
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )(x)


@pytest.mark.parametrize("shared", [True, False])
def test_finds_what_an_earlier_launch_did(races, shared):
    x = jnp.arange(128, dtype=jnp.float32)
    launch(x, shared=shared, waits=True).block_until_ready()
    assert not races.found
    launch(x, shared=shared, waits=False).block_until_ready()
    launch(x, shared=shared, waits=True).block_until_ready()
    assert races.found


def test_global_memory_is_not_judged_where_that_is_said(races):
    races.in_global = False
    x = jnp.arange(128, dtype=jnp.float32)
    launch(x, shared=False, waits=False).block_until_ready()
    assert not races.found
    launch(x, shared=True, waits=False).block_until_ready()
    assert races.found


def test_no_launch_is_no_answer(races):
    with pytest.raises(AssertionError):
        assert races.found
