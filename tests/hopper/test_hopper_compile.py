"""The Hopper kernels compiled for sm_90a: registers, spills, shared memory; and their launches."""

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_batch import SCALE, HopperBatch
from sass import overwritten_in_flight

from pallas_kernels.hopper import attention, device, planning
from pallas_kernels.hopper.tuned import choose_config

BF16, F16 = jnp.bfloat16, jnp.float16


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "page_size", "dtype", "rescale", "widths"),
    [
        (40, 7, 3, 1, F16, "multiply", (512, 64)),  # in pairs, gathers pages
        (5, 64, 1, 16, BF16, "multiply", (128, 64)),  # in pairs, copies pages by TMA
        # Above is each kernel and each way to load pages, of which the kernel of 64 rows is narrow.
        # The others take minutes of a small machine, so they run where GPU tests do.
        aot.on_gpu_machines(5, 64, 1, 16, BF16, "multiply", (512, 64)),
        aot.on_gpu_machines(40, 32, 1, 64, BF16, "multiply", (512, 64)),  # in pairs
        aot.on_gpu_machines(5, 64, 1, 64, BF16, "multiply", (512, 64)),
        aot.on_gpu_machines(5, 43, 3, 16, BF16, "exponent_add", (512, 64)),
        aot.on_gpu_machines(5, 48, 2, 1, BF16, "multiply", (512, 64)),
        aot.on_gpu_machines(5, 16, 1, 64, BF16, "multiply", (512, 64)),
        aot.on_gpu_machines(5, 5, 1, 16, F16, "multiply", (512, 64)),
        aot.on_gpu_machines(40, 24, 1, 64, BF16, "multiply", (384, 128)),
        aot.on_gpu_machines(5, 64, 1, 16, F16, "exponent_add", (512, 64)),
        aot.on_gpu_machines(5, 41, 1, 1, BF16, "multiply", (512, 64)),
        aot.on_gpu_machines(5, 128, 1, 64, F16, "multiply", (512, 64)),
    ],
)
def test_compiles_for_sm90a(h200, batch, heads, tokens, page_size, dtype, rescale, widths):
    """No product is serialized, no register spilled, and shared memory is what the config says."""
    kv_lora_rank, rope_dim = widths

    def attend(*args):
        return attention.attend(
            *args,
            num_heads=heads,
            kv_lora_rank=kv_lora_rank,
            softmax_scale=SCALE,
            causal=True,
            rescale=rescale,
        )

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    plan_decode = functools.partial(
        planning.plan_decode,
        rows=tokens * heads,
        capacity=5003 * page_size,
        rescale=rescale,
        kv_lora_rank=kv_lora_rank,
        rope_dim=rope_dim,
        num_heads=heads,
    )
    reports = aot.compile_sm90a(
        attend,
        jax.ShapeDtypeStruct((batch, tokens * heads, sum(widths)), dtype),
        jax.ShapeDtypeStruct((1000, page_size, sum(widths)), dtype),  # (powers of two are easier)
        ints(batch, 5003),
        ints(batch),
        ints(batch),
        jax.eval_shape(plan_decode, ints(batch), query_lens=ints(batch)),
    )
    (report,) = reports  # the merge is in the decode launch
    assert not report.serialized, report.messages
    assert not report.ignores_setmaxnreg, report.messages
    assert not report.misuses_setmaxnreg
    # A config's bytes are those that the compiler takes.
    config = choose_config(
        tokens * heads, batch=batch, rescale=rescale, kv_lora_rank=kv_lora_rank, rope_dim=rope_dim
    )
    assert report.shared_memory == config.shared_memory_bytes <= 232_448
    assert report.registers <= 255
    assert report.spill_stores == report.spill_loads == 0, report
    if report.sass is not None:
        assert "HGMMA" in report.sass
        assert overwritten_in_flight(report.sass) == []


@pytest.mark.parametrize(("sms", "launches"), [(131, 2), (132, 1)])
def test_workers_wait_only_where_all_run_at_once(monkeypatch, sms, launches):
    """Where a card is not known to have an SM for each CTA, the merge is a launch of its own."""
    heads = 128  # so that a worker has two CTAs
    monkeypatch.setattr(device, "resident_ctas", lambda: sms)
    monkeypatch.setattr(device, "num_sms", lambda: 132)  # when the plan was made
    batch = HopperBatch(np.random.default_rng(0), [300, 70], heads=heads)
    plan = jax.eval_shape(lambda lens: planning.plan_decode(lens, heads), batch.seq_lens)
    assert plan.split.num_workers * plan.tiles.ctas_per_tile == plan.num_sms == 132
    kernel = functools.partial(
        attention.attend.__wrapped__,
        num_heads=heads,
        kv_lora_rank=512,
        softmax_scale=SCALE,
        causal=True,
    )
    traced = jax.make_jaxpr(kernel)(
        np.asarray(batch.q)[:, 0], batch.cache.pages, batch.block_tables, batch.seq_lens, None, plan
    )
    assert str(traced).count("mpmd_map[") == launches
