"""The compile test itself sees wgmma, registers, spills and serialization without a GPU."""

import contextlib
import dataclasses
import os
from collections.abc import Callable

import aot
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

M, N, K = 64, 256, 64
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def repeated_matmul(num_accumulators: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """[M, K] x [K, N] by TMA and wgmma, into accumulators of 128 registers a thread each."""

    def kernel(a, b, out, a_smem, b_smem, out_smem, loaded):
        plgpu.copy_gmem_to_smem(a, a_smem, loaded)
        plgpu.copy_gmem_to_smem(b, b_smem, loaded)
        plgpu.barrier_wait(loaded)

        def multiply(*accumulators):
            for accumulator in accumulators:
                plgpu.wgmma(accumulator, a_smem, b_smem)
            plgpu.wgmma_wait(0)
            for i, accumulator in enumerate(accumulators):
                out_smem[...] = accumulator[...].astype(out.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem, out.at[i])
                plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(multiply, *[plgpu.ACC((M, N), jnp.float32)] * num_accumulators)

    def tile(*shape: int):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=TRANSFORMS)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_accumulators, M, N), jnp.bfloat16),
        scratch_types=[tile(M, K), tile(K, N), tile(M, N), plgpu.Barrier(num_arrivals=2)],
        grid=(1,),
        grid_names=("block",),
    )


def operands() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return (
        jax.ShapeDtypeStruct((M, K), jnp.bfloat16),
        jax.ShapeDtypeStruct((K, N), jnp.bfloat16),
    )


def test_a_clean_kernel(monkeypatch, tmp_path, capfd):
    """Also where someone else has asked for dumps, which stay as they are."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "0")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    before = dict(os.environ)
    (report,) = aot.compile_sm90a(repeated_matmul(1), *operands())
    assert report.name
    assert not capfd.readouterr().out
    assert dict(os.environ) == before
    assert not [*tmp_path.glob("*.log"), *tmp_path.glob("*.ptx")]  # nothing of the compile
    assert ".target sm_90a" in report.ptx
    assert "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16" in report.ptx
    assert "cp.async.bulk.tensor" in report.ptx
    assert 128 < report.registers < 200
    assert report.stack_frame == report.spill_stores == report.spill_loads == 0
    assert not report.serialized
    assert report.sass is None or "HGMMA" in report.sass
    tiles = 2 * (M * K + K * N + M * N)
    assert tiles < report.shared_memory <= tiles + 1024


def test_a_kernel_that_spills():
    (report,) = aot.compile_sm90a(repeated_matmul(3), *operands())
    assert report.registers == 255
    assert report.stack_frame > 0
    assert report.spill_stores > 0
    assert report.spill_loads > 0
    assert report.serialized


def test_kernels_inside_a_jitted_function_are_all_reported():
    def function(a, b):
        once = repeated_matmul(1)(a, b)[0]
        return repeated_matmul(2)(a + 1, b).sum(0) + jax.nn.softmax(once)

    first, second = aot.compile_sm90a(jax.jit(function), *operands())
    assert sorted([first.registers > 200, second.registers > 200]) == [False, True]


def test_a_function_without_kernels():
    assert aot.compile_sm90a(lambda a, b: a @ b, *operands()) == ()


def test_stdout_is_given_back(capfd):
    with contextlib.suppress(ZeroDivisionError), aot._stdout_of_c():
        os.write(1, b"taken")
        raise ZeroDivisionError
    os.write(1, b"left alone")
    assert capfd.readouterr().out == "left alone"


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(aot, "_cuda_roots", lambda: iter(()))
    with pytest.raises(RuntimeError, match="nvidia-nvvm"):
        aot.compile_sm90a(lambda a, b: a @ b, *operands())
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="jax-cuda13-plugin"):
        aot.compile_sm90a(lambda a, b: a @ b, *operands())


def test_the_remarks_of_ptxas():
    log = """\
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
    fields = aot.parse_ptxas(log)
    report = aot.CompileReport("kernel", shared_memory=0, ptx="", sass=None, **fields)
    assert (report.registers, report.stack_frame) == (168, 8)
    assert (report.spill_stores, report.spill_loads) == (12, 16)
    assert report.serialized
    assert report.ignores_setmaxnreg
    assert not report.misuses_setmaxnreg
    for step, misuse in (("inc", 160), ("dec", 176)):
        for count in (160, 168, 176):
            ptx = f"setmaxnreg.{step}.sync.aligned.u32 {count};"
            at_fault = dataclasses.replace(report, ptx=ptx).misuses_setmaxnreg
            assert at_fault == (count == misuse)
    with pytest.raises(ValueError, match="Used"):
        aot.parse_ptxas("ptxas fatal: no such thing")
