"""The experiment `calibrate`: its kernels, its arithmetic, the file that it writes."""

import functools
import json

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import launch
from experiments.framework.experiment import Output
from experiments.speed.calibrate import calibrate, constants, microbenchmarks
from experiments.speed.calibrate.constants import Constant
from mla_jax.hal import load_profile
from pallas_kernels.hopper import calibration as kernels
from pallas_kernels.hopper import device

H200 = load_profile("H200_SXM")
PARAMS = jax.ShapeDtypeStruct((3,), jnp.int32)
TILES = jax.ShapeDtypeStruct((64, *kernels.TILE), jnp.int32)
VALUES = jax.ShapeDtypeStruct((4, *kernels.PER_WARPGROUP), jnp.float32)
PRODUCTS = functools.partial(kernels.matrix_products, ctas=132)


def operands(dtype, n):
    return tuple(jax.ShapeDtypeStruct((m, kernels.PRODUCT_K), dtype) for m in (64, n))


def test_kernels_compile_for_sm90a():
    """Each kernel has its instruction and two stamps, and spills nothing."""
    cases = {
        "cp.async.bulk.tensor.3d.shared": (
            functools.partial(kernels.reads, ctas=132), PARAMS, TILES,
        ),
        "cp.async.bulk.global.shared::cta": (
            functools.partial(kernels.writes, ctas=132, tiles=64),
            *(PARAMS, jax.ShapeDtypeStruct(kernels.TILE, jnp.int32)),
        ),
        "mbarrier.try_wait": (kernels.copy_latency, PARAMS, TILES),
        "m64n64k16.f32.bf16": (
            functools.partial(PRODUCTS, warpgroups=1), PARAMS, *operands(jnp.bfloat16, 64),
        ),
        "m64n256k32.f32.e4m3": (
            functools.partial(PRODUCTS, warpgroups=2), PARAMS, *operands(jnp.float8_e4m3fn, 256),
        ),
        "m64n256k32.s32.s8": (
            functools.partial(PRODUCTS, warpgroups=2), PARAMS, *operands(jnp.int8, 256),
        ),
        "ex2.approx.ftz": (kernels.exponentials, PARAMS, VALUES),
        "cvt.rn.bf16": (kernels.conversions, PARAMS, VALUES),
        "mbarrier.arrive.release.cta": (kernels.barrier_exchanges, PARAMS),
        "mbarrier.arrive.relaxed.cluster": (kernels.cluster_exchanges, PARAMS),
        "red.relaxed.gpu": (functools.partial(kernels.grid_barriers, ctas=132), PARAMS),
    }  # fmt: skip
    for instruction, (kernel, *args) in cases.items():
        (report,) = aot.compile_sm90a(kernel, *args)
        assert report.spill_stores == report.spill_loads == 0, instruction
        assert not report.serialized, instruction
        assert instruction in report.ptx
        stamped_ways = 2 if kernel is kernels.barrier_exchanges else 1
        assert report.ptx.count("mov.u32 c, %clock") == 2 * stamped_ways
        assert report.ptx.count("wgmma.mma_async") in (0, 8, 16)  # the loop is not unrolled


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run in the interpreter, without stamps and layouts."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    kernel, load = plgpu.kernel, plgpu.load
    interpret = functools.partial(kernel, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(plgpu, "kernel", interpret)
    monkeypatch.setattr(plgpu, "load", lambda ref, **_: load(ref))
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, _: x)
    monkeypatch.setattr(kernels, "stamp_clock", lambda *_, **__: None)


def test_each_sm_reads_its_own_tiles(interpreted):
    tiles = jnp.arange(32 * 64 * 128, dtype=jnp.int32).reshape(32, *kernels.TILE)
    params = jnp.asarray([9, 2, 15], jnp.int32)
    got, _ = kernels.reads(params, tiles, ctas=3)
    for cta in range(2):
        wanted = sum(np.asarray(tiles)[(i * 2 + cta) % 15, 0] for i in range(9))
        np.testing.assert_array_equal(got[cta], wanted)
    assert not got[2].any()


def test_each_sm_writes_its_own_tiles(interpreted):
    tile = jnp.arange(64 * 128, dtype=jnp.int32).reshape(kernels.TILE)
    got, _ = kernels.writes(jnp.asarray([4, 2, 8], jnp.int32), tile, ctas=3, tiles=9)
    assert (got[:8] == tile).all()
    assert not (got[8] == tile).all()


def test_copies_step_over_tiles(interpreted):
    tiles = jnp.arange(8 * 64 * 128, dtype=jnp.int32).reshape(8, *kernels.TILE)
    got, _ = kernels.copy_latency(jnp.asarray([2, 3, 8], jnp.int32), tiles)
    copies = 2 * kernels.ROWS * 3 // 2
    wanted = sum(np.asarray(tiles)[i * 3 % 8, 0] for i in range(copies))
    np.testing.assert_array_equal(got, wanted)


def test_warpgroups_meet(interpreted):
    got, _ = kernels.barrier_exchanges(jnp.asarray([1, 0, 0], jnp.int32))
    assert (got == kernels.ROWS * 3 // 2).all()


def test_elements_are_computed_again_and_again(interpreted):
    x = jnp.linspace(-2, 2, 4 * 64 * 32).reshape(4, *kernels.PER_WARPGROUP)
    once = jnp.asarray([1, 0, 0], jnp.int32)
    np.testing.assert_allclose(kernels.exponentials(once, x)[0], 0.6411857, rtol=1e-4)
    converted = np.asarray(kernels.conversions(once, x)[0])  # 24 times: back, but for rounding
    assert 1e-4 < np.abs(converted - x).max() < 0.02


def stamps_of(cycles, ns, *, ctas=3, warpgroups=2, count=10, fixed=100, start=2**32 - 700):
    """Stamps of rows of `count` and 2 * count repetitions; both counters wrap."""
    stamps = np.zeros((ctas, warpgroups, 1, kernels.ROWS, 2, 2), np.uint32)
    for row in range(kernels.ROWS):
        times = count * (1 + row % 2)
        begin = start + 7 * row
        stamps[..., row, 0, :] = begin % 2**32
        for value, each in enumerate((cycles, ns)):
            stamps[..., row, 1, value] = (begin + fixed + times * each) % 2**32
    return stamps.view(np.int32)


def test_arithmetic_of_stamps():
    stamps = stamps_of(cycles=50, ns=25)
    assert constants.slopes(stamps, 10) == [50.0] * (kernels.ROWS // 2 - 1)
    assert constants.slopes(stamps, 10, constants.TIMER) == [25.0] * (kernels.ROWS // 2 - 1)
    long = stamps_of(cycles=150_000_000, ns=25)  # 3e9 cycles, more than int32 has
    assert constants.slopes(long, 10) == [150e6] * (kernels.ROWS // 2 - 1)
    # From the first start to the end of the last long row.
    assert constants.span(stamps) == pytest.approx((7 * 15 + 100 + 20 * 25) * 1e-9)
    assert constants.clock_rate(stamps_of(cycles=40, ns=20, fixed=0))[0] == pytest.approx(2e9)
    assert constants.rates([2.0, 0.5], 4.0) == (2.0, 8.0)
    assert np.isnan(constants.rates([-1.0], 4.0)[0])


def measured(name="exp2", samples=(15.0, 16.0, 15.5), field="engine.sfu", most=16.3):
    return Constant(name, samples, "element/cycle", "by hand", 2.0, most, field)


def test_profile_file_loads(tmp_path):
    found = [
        measured(),
        measured("impossible", (90.0,), "engine.cuda"),
        measured("not a number", (float("nan"),), "engine.widen"),
        measured("no field", (3.0,), ""),
    ]
    outcome = calibrate.report(Output(tmp_path), H200, found, [])
    assert not outcome.passed
    assert outcome.summary.endswith("failed: impossible, not a number")
    profile = load_profile(tmp_path / "profile.json")
    number = profile.numbers["engine.sfu"]
    assert (number.value, number.certainty) == (15.5, "measured")
    assert "15 to 16 element/cycle" in number.source
    assert profile["engine.cuda"] == H200["engine.cuda"]
    assert "no field 3 element/cycle" in profile.note
    rows = {row["name"]: row for row in outcome.rows}
    assert rows["exp2"]["ratio"] == 15.5 / 16
    assert rows["not a number"]["value"] is None
    assert calibrate.report(Output(tmp_path), H200, found[:1], []).passed


def test_one_failure_keeps_the_others(tmp_path, monkeypatch):
    class Bench:
        def __init__(self, profile, sms):
            assert (profile, sms) == (H200, 132)

        def read(self):
            yield measured()
            raise RuntimeError("no\nmemory")

        def write(self):
            yield measured("another", field="")

    monkeypatch.setattr(microbenchmarks, "Bench", Bench)
    monkeypatch.setattr(microbenchmarks, "BENCHES", ("read", "write"))
    monkeypatch.setattr(device, "machine_lacks", lambda: None)
    monkeypatch.setattr(device, "machine_sms", lambda: 132)
    status = launch.main(
        ["launch", "--experiment=calibrate", f"--output_dir={tmp_path}", "--like=H200_SXM"]
    )
    result = json.loads((tmp_path / "calibrate" / "result.json").read_text())
    assert status == 1
    assert result["summary"] == "measured 1 fields of H200_SXM; failed: read"
    assert [row["name"] for row in result["rows"]] == ["exp2", "another", "read"]
    assert result["rows"][2]["status"] == "failed: RuntimeError: no memory"


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--only=reed", "--only: got 'reed'"), ("--like=H200_SXM", "it needs an NVIDIA GPU")],
)
def test_refusals(tmp_path, capsys, monkeypatch, flag, message):
    monkeypatch.setattr(device, "card", lambda: None)
    assert launch.main(["launch", "--experiment=calibrate", f"--output_dir={tmp_path}", flag]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    status = launch.main(["launch", "--experiment=calibrate", f"--output_dir={tmp_path}"])
    result = json.loads((tmp_path / "calibrate" / "result.json").read_text())
    assert status == 0, result["summary"]
    assert result["duration_s"] < 60
    assert load_profile(tmp_path / "calibrate" / "profile.json").name == "H200_SXM_measured"


SMS = 132
HBM_NS, L2_NS, ALONE_NS = 1000, 600, 500  # per tile, of all SMs or of one
L2_TILES = 16


def fake_stamps(count, cycles, ns, *, ctas=1, warpgroups=1, rows=kernels.ROWS):
    """Stamps of a device on which each repetition takes so long, and a row 300 more."""
    times = count * (1 + jnp.arange(rows) % 2)
    ends = jnp.stack([300 + times * cycles, 300 + times * ns], -1)
    of_row = jnp.stack([jnp.zeros_like(ends), ends], 1)
    return jnp.broadcast_to(of_row, (ctas, warpgroups, 1, rows, 2, 2)).astype(jnp.int32)


class FakeKernels:
    """Kernels of `calibration` by plain JAX, with stamps of a device of even speed."""

    TILE, ROWS, PRODUCT_K, PER_WARPGROUP = (
        *(kernels.TILE, kernels.ROWS),
        *(kernels.PRODUCT_K, kernels.PER_WARPGROUP),
    )
    wrong = ""  # the kernel that returns another result than it should

    def _spoil(self, name, result):
        return result + (name == self.wrong)

    @staticmethod
    def _tile_stamps(params, ctas):
        of_all = jnp.where(params[2] == L2_TILES, L2_NS, HBM_NS)
        ns = jnp.where(params[1] == 1, ALONE_NS, of_all)
        return fake_stamps(params[0], 2 * ns, ns, ctas=ctas, rows=1)

    def reads(self, params, source, *, ctas):
        count, active, tiles = params
        cta = jnp.arange(ctas)

        def add(i, total):
            return total + source[(i * active + cta) % tiles, 0] * (cta < active)[:, None]

        total = jax.lax.fori_loop(0, count, add, jnp.zeros((ctas, 128), jnp.int32))
        return self._spoil("reads", total), self._tile_stamps(params, ctas)

    def writes(self, params, tile, *, ctas, tiles):
        out = jnp.broadcast_to(self._spoil("writes", tile), (tiles, *tile.shape))
        return out, self._tile_stamps(params, ctas)

    def nothing(self, x):
        return self._spoil("nothing", x)

    def matrix_products(self, params, a, b, *, ctas, warpgroups):
        dtype = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
        product = a.astype(jnp.float32) @ b.astype(jnp.float32).T
        total = product * (params[0] * kernels.ROWS * 3 // 2)
        out = jnp.broadcast_to(total.astype(dtype), (ctas * warpgroups, *product.shape))
        peak = 4096 if a.dtype == jnp.bfloat16 else 8192
        cycles = 2 * warpgroups * product.size * kernels.PRODUCT_K // peak * 2  # half of the peak
        stamps = fake_stamps(params[0], cycles, cycles, ctas=ctas, warpgroups=warpgroups)
        return self._spoil("matrix_products", out), stamps

    def exponentials(self, params, x):
        x = jax.lax.fori_loop(0, 40, lambda _, x: jnp.exp2(-x), x)
        return self._spoil("exponentials", x), fake_stamps(params[0], 1024, 512, warpgroups=4)

    def conversions(self, params, x):
        return self._spoil("conversions", x), fake_stamps(params[0], 512, 256, warpgroups=4)

    def _met(self, name, params, shape, ns):
        count = params[0] * kernels.ROWS * 3 // 2
        result = jnp.broadcast_to(count, (*shape, 128))
        return self._spoil(name, result), fake_stamps(params[0], 2 * ns, ns, ctas=shape[0])

    def barrier_exchanges(self, params):
        return self._met("barrier_exchanges", params, (2,), 40)

    def cluster_exchanges(self, params):
        return self._met("cluster_exchanges", params, (2,), 300)

    def grid_barriers(self, params, *, ctas):
        return self._met("grid_barriers", params, (ctas,), 1500)

    def copy_latency(self, params, source):
        count, stride, tiles = params

        def add(i, total):
            return total + source[i * stride % tiles, 0]

        total = jax.lax.fori_loop(0, count * kernels.ROWS * 3 // 2, add, jnp.zeros(128, jnp.int32))
        ns = jnp.where(stride == 0, 300, 700)
        return self._spoil("copy_latency", total), fake_stamps(count, 2 * ns, ns)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(microbenchmarks, "kernels", fake := FakeKernels())
    monkeypatch.setattr(microbenchmarks, "TILES", 64)
    monkeypatch.setattr(microbenchmarks, "L2_TILES", L2_TILES)
    monkeypatch.setattr(microbenchmarks, "ALONE", 40)
    taken = microbenchmarks.timing.Timing(2.0, 1.5, 2.5, False)
    monkeypatch.setattr(microbenchmarks.timing, "measure", lambda bursts, **_: {"launch": taken})
    caches = microbenchmarks._source, microbenchmarks._products
    for cache in caches:
        cache.cache_clear()
    yield fake
    for cache in caches:
        cache.cache_clear()


def test_every_benchmark_on_a_device_of_known_speed(fake):
    bench = microbenchmarks.Bench(H200, SMS)
    found = [c for name in microbenchmarks.BENCHES for c in getattr(bench, name)()]
    values = {c.name: c.value for c in found}
    bandwidth = SMS * 32768 / 1000e-9
    wanted = {
        "HBM read": bandwidth,
        "HBM read over its peak": bandwidth / 4.8e12,
        "HBM read of one SM": 32768 / 500e-9,
        "L2 read": SMS * 32768 / 600e-9,
        "HBM write": bandwidth,
        "HBM write of one SM": 32768 / 500e-9,
        "launch after another": 2e-6,
        "wgmma bfloat16 64x64, 1 warpgroups": 2048,
        "wgmma bfloat16 64x256, 2 warpgroups": 2048,
        "wgmma int8 64x256, 2 warpgroups": 4096,
        "exp2": 8,
        "float32 to bfloat16 and back, and a subtraction": 16,
        "mbarrier between two warpgroups": 20e-9,
        "cluster barrier": 300e-9,
        "TMA copy from L2": 300e-9,
        "TMA copy from HBM": 700e-9,
        "grid barrier": 1500e-9,
        "sustained clock": 1e9,
        "sustained bf16 products over the peak at boost clock": 0.5 / 1.98,
    }
    assert {name: values[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    assert not [c for c in found if c.problem]


@pytest.mark.parametrize(
    ("bench", "kernel"),
    [
        ("read", "reads"), ("write", "writes"), ("launch", "nothing"),
        ("elementwise", "exponentials"), ("elementwise", "conversions"),
        ("warpgroups", "barrier_exchanges"), ("latency", "copy_latency"),
        ("wgmma", "matrix_products"),
    ],
)  # fmt: skip
def test_wrong_output_is_refused(fake, bench, kernel):
    fake.wrong = kernel
    if kernel == "matrix_products":
        fake._spoil = lambda name, result: result * 2
    with pytest.raises(microbenchmarks.WrongOutputError, match="wrong output"):
        list(getattr(microbenchmarks.Bench(H200, SMS), bench)())
