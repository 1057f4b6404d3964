"""The demo: what it runs on which machine, whose numbers it shows, and pictures of anything."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from experiments import launch
from experiments.accuracy import amla_accuracy, correctness, int8_accuracy
from experiments.framework import plotting
from experiments.framework.experiment import Output
from experiments.framework.machine_options import report_row
from experiments.serving import demo, demo_plan, demo_results, demo_served
from experiments.serving.demo_batch import PHASES, Batch
from experiments.simulated import published, sweep
from experiments.speed import prefill, prefill_batches, timing
from experiments.speed.shapes import Shape
from mla_jax.hal import PROFILES, Problem, simulate
from mla_jax.hal.simulator.trace import describe
from mla_jax.prefill.registry import RAGGED_IMPLEMENTATIONS
from mla_jax.reference.attention import attention_float64
from mla_jax.registry import IMPLEMENTATIONS

GIB = 2**30
CPU = demo_plan.Machine(
    "cpu", "cpu", None, dict.fromkeys(IMPLEMENTATIONS) | {"hopper": "it needs a GPU"}
)
H200 = demo_plan.Machine("gpu", "NVIDIA H200", 105 * GIB, dict.fromkeys(IMPLEMENTATIONS))
A100 = demo_plan.Machine(
    "gpu", "NVIDIA A100-SXM4-40GB", 30 * GIB, dict(CPU.reasons) | {"hopper": "it needs 9.0"}
)
TINY = (
    *("--checkpoint=tests/data/golden/v2_lite", "--requests=2", "--max_prompt=5", "--chunk=4"),
    *("--page_size=16", "--decode_steps=2", "--mtp_steps=1", "--nomodel"),
)


def launched(tmp_path, *arguments):
    """(exit status, result.json) of the demo in small."""
    argv = ["launch", "--experiment=demo", f"--output_dir={tmp_path}", *TINY, *arguments]
    status = launch.main(argv)
    return status, json.loads((tmp_path / "demo" / "result.json").read_text())


@pytest.fixture
def cheap_layer(monkeypatch):
    """A layer that compiles at once: its output is 0, and it counts steps in the cache's pages."""

    def layer(params, config, x, cache, block_tables, seq_lens, *, query_lens, implementation):
        return x * 0, dataclasses.replace(cache, pages=cache.pages + 1)

    monkeypatch.setattr(demo, "mla_layer", layer)


class TestPlan:
    def test_a_cpu_runs_all_and_times_nothing_that_is_served(self):
        plan = demo_plan.plan(CPU)
        assert plan.dtype == "float32"
        assert plan.implementations == ("reference", "xla", "split_kv", "blockwise")
        assert plan.not_run == {"hopper": "it needs a GPU"}
        assert plan.served == plan.timed == ()
        assert plan.prefilled is None

    def test_an_h200_runs_the_fast_ones_and_times_a_served_batch(self):
        plan = demo_plan.plan(H200)
        assert plan.dtype == "bfloat16"
        assert plan.implementations == plan.timed == ("hopper", "xla")
        assert set(plan.not_run) == {"reference", "split_kv", "blockwise"}
        found = {(s.heads, s.batch, s.s_q, s.kv_len, s.dtype) for s in plan.served}
        assert found == {(16, 128, 1, 4096, "bf16"), (128, 128, 1, 4096, "bf16")}
        assert plan.prefilled == prefill_batches.Batch(4, 1024)

    def test_a_gpu_without_hopper(self):
        plan = demo_plan.plan(A100)
        assert plan.implementations == ("xla", "reference")
        assert plan.timed == ("xla",)
        assert plan.not_run["hopper"] == "it needs 9.0"
        assert len(plan.served) == 2
        assert plan.prefilled is not None

    @pytest.mark.parametrize("memory", [None, 2 * GIB, 8 * GIB, 24 * GIB])
    def test_a_served_batch_fits(self, memory):
        plan, most = demo_plan.plan(dataclasses.replace(H200, memory=memory)), memory or 8 * GIB
        assert plan.served
        assert max(map(demo_plan.needed_bytes, plan.served)) <= most / 2
        assert demo_plan.prefill_bytes(plan.prefilled) <= most / 2
        assert not demo_plan.served_shapes(2**20)
        assert demo_plan.prefilled_batch(2**20) is None

    def test_what_is_asked_for_goes_first(self):
        names = tuple(f"one_{i}" for i in range(30))
        many = dataclasses.replace(CPU, reasons=dict.fromkeys(names))
        assert demo_plan.plan(many).implementations == names
        assert demo_plan.plan(H200, implementations=["split_kv"]).served == ()
        asked = demo_plan.plan(H200, implementations=["xla"], dtype="float16", served=False)
        assert (asked.implementations, asked.dtype, asked.served) == (("xla",), "float16", ())


@pytest.mark.usefixtures("cheap_layer", "unrendered")
def test_on_a_machine_that_says_it_is_an_h200(tmp_path, monkeypatch, capsys):
    """All that a GPU would run, with `xla` in the place of the kernels, a small served batch and
    a layer of no worth; a compiler's failure takes nothing but its own row."""
    for implementations in (IMPLEMENTATIONS, RAGGED_IMPLEMENTATIONS):
        fake = dataclasses.replace(implementations["xla"], name="hopper")
        monkeypatch.setitem(implementations, "hopper", fake)
    monkeypatch.setattr(demo_plan.Machine, "here", staticmethod(lambda: H200))
    step = Shape(2, "bf16", 2, 1, 64, "uniform", 128)
    monkeypatch.setattr(demo_plan, "served_shapes", lambda memory: (step,))
    monkeypatch.setattr(demo_plan, "prefilled_batch", lambda memory: prefill_batches.Batch(1, 64))
    monkeypatch.setattr(demo_plan, "PREFILL_HEADS", 2)
    setup = dataclasses.replace(demo_plan.served_setup(None), kv_lora_rank=128, rope_dim=64,
                                usual_layers=2, launches=2, rounds=1)  # fmt: skip
    monkeypatch.setattr(demo_plan, "served_setup", lambda memory: setup)

    def time_once(bursts, **_):
        return {
            name: timing.Timing(1e6 * b.run(1)[1], 1.0, 2.0, False) for name, b in bursts.items()
        }

    monkeypatch.setattr(demo_served, "time_bursts", time_once)
    monkeypatch.setattr(prefill, "time_bursts", time_once)
    compile_job = prefill.Job.compile

    def compile_some(job):
        if job.name == "hopper":
            raise RuntimeError("ptxas has died\nof something")
        return compile_job(job)

    monkeypatch.setattr(prefill.Job, "compile", compile_some)
    status, result = launched(tmp_path, "--noint8")
    assert status == 1
    assert result["files"] == ["demo.png", "served.png"]
    assert [r["implementation"] for r in result["rows"] if "cache" in r] == ["hopper", "xla"]
    decode, decode_xla, failed, prefill_xla = result["served"]
    assert [row["passed"] for row in result["served"]] == [True, True, False, True]
    assert decode["speed_over_xla"] == pytest.approx(decode_xla["ms"] / decode["ms"])
    assert failed == {
        "phase": "prefill", "batch": "1 x 64 tokens", "heads": 2, "implementation": "hopper",
        "ms": "failed: ptxas has died", "passed": False,
    }  # fmt: skip
    assert "speed_over_xla" not in prefill_xla
    out = capsys.readouterr().out
    assert "failed: ptxas has died" in out
    assert "hopper takes" in result["summary"]


def test_the_served_check_sees_wrong_numbers(monkeypatch):
    """A program that gives what float64 gives passes; one that is off or not finite does not."""
    shape = Shape(2, "bf16", 2, 3, 64, "uniform", 64)
    setup = dataclasses.replace(demo_plan.served_setup(None), kv_lora_rank=32, rope_dim=16)
    (job,) = demo_served.jobs_of([shape], ["xla"], setup)
    layers = job.work.pool.fill(setup)
    inputs = demo_served.make_inputs(job.work, layers)
    found = [
        attention_float64(
            np.asarray(inputs.q[request]), inputs.rows_of(request, 1),
            softmax_scale=demo_served.SCALE, kv_lora_rank=32,
        )
        for request in range(2)
    ]  # fmt: skip
    o, lse = (np.stack(values).astype(np.float32) for values in zip(*found, strict=True))

    class Fake:
        launches, layers = 2, 2
        bursts = property(lambda self: {"us": self})

        def last_output(self, *_):
            return self.o, self.lse

    def verdict(o, lse):
        fake = Fake()
        fake.o, fake.lse = jax.numpy.asarray(o), jax.numpy.asarray(lse)
        return demo_served.check(inputs, {"xla": fake})["xla"]["passed"]

    monkeypatch.setattr(demo_served.Inputs, "shared", lambda *_: None)
    assert verdict(o, lse)
    assert not verdict(o * 1.01, lse)
    assert not verdict(o, lse + 3e-3)
    broken = o.copy()
    broken[1, 1, 1, 3] = np.nan
    assert not verdict(broken, lse)


class TestRefused:
    @pytest.mark.usefixtures("cheap_layer", "unrendered")
    def test_a_refused_step_has_no_numbers(self, tmp_path, monkeypatch, capsys):
        """`blockwise` with prefill refused over float32 and everything over int8. Alone, so that
        another one must fill its cache, which shows nowhere."""
        blockwise = IMPLEMENTATIONS["blockwise"]

        def refuses(problem):
            if problem.cache.dtype == "int8":
                return "it takes no int8"
            return "it takes no prompts" if problem.q.shape[1] == 4 else blockwise.refuses(problem)

        patched = dataclasses.replace(blockwise, refuses=refuses)
        monkeypatch.setitem(IMPLEMENTATIONS, "blockwise", patched)
        ran = []
        run = demo.Runner.run

        def spied(self, program, index, step, wanted):
            done = float(self.cache.pages.astype("float32").max())  # steps that its cache has seen
            ran.append((self.name, self.cache_dtype, step.phase))
            assert done == index
            return run(self, program, index, step, wanted)

        monkeypatch.setattr(demo.Runner, "run", spied)
        status, result = launched(tmp_path, "--implementations=blockwise")
        assert status == 1  # the layer is of no worth
        float32, int8 = (row for row in result["rows"] if row["implementation"] == "blockwise")
        assert float32["prefill_error"] == "refused: it takes no prompts"
        assert float32["prefill_ms"] == "refused"
        assert float32["decode_error"] == float32["MTP_error"] == 1
        assert float32["passed"] is False
        assert int8["passed"] is None
        assert int8["decode_error"].startswith("refused: it takes no int8")
        for phase in PHASES:
            assert isinstance(int8[f"{phase}_error"], str)
            assert int8[f"{phase}_ms"] == "refused"
        by = {name for name, cache, phase in ran if cache == "int8"}
        assert by == set()
        assert ("blockwise", "float32", "prefill") not in ran
        assert ("xla", "float32", "prefill") in ran
        assert "xla" not in {row["implementation"] for row in result["rows"]}
        table = capsys.readouterr().out
        assert "refused prefill: it takes no prompts" in table

    def test_a_number_stays_with_who_computed_it(self):
        measured = [
            demo_results.Measurement(name, cache, 0, phase, error, 1.0)
            for name, cache, phase, error in (
                ("xla", "int8", "prefill", 0.5), ("blockwise", "float32", "prefill", 0.25),
                ("blockwise", "int8", "decode", 0.125),
            )
        ]  # fmt: skip

        class Lane:
            name, cache_dtype, bound, cache_bytes = "blockwise", "int8", 0.2, 7
            refused = {"prefill": "no", "MTP": "no"}  # noqa: RUF012

        row = demo_results.Result.of(Lane(), measured).row()
        assert row["prefill_error"] == row["MTP_error"] == "refused: no"
        assert row["decode_error"] == 0.125
        assert row["note"] == "refused prefill, MTP: no"


NASTY = ["_hidden", "a$b$c", r"\frac{$", "x" * 300, "", "ünï\ncode"]


def names(count):
    return [NASTY[i] + f"{i}" * (i >= len(NASTY)) if i < len(NASTY) else f"s{i}_$" for i in
            range(count)]  # fmt: skip


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("count", [0, 12])
class TestPictures:
    """Any number of series, with names and numbers as they come; the last of several is NaN."""

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        monkeypatch.setitem(plotting._STYLE, "path.simplify", True)
        monkeypatch.setattr(plotting, "MOST_PIXELS", 600)

    @staticmethod
    def value(i, count):
        return math.nan if count > 1 and i == count - 1 else 1e-3 * (i + 1)

    def test_demo(self, tmp_path, count):
        options = demo.Options(requests=30, max_prompt=9, chunk=4, decode_steps=1, mtp_steps=1)
        batch = Batch.draw(options, dataclasses.replace(demo.small_config(), hidden_size=2), "int8")
        results = [
            demo_results.Result(name, "int8", 1e-2, 10, {"decode": "no"}, [
                demo_results.Measurement(name, "int8", 0, "prefill", self.value(i, count), 1.0)
            ] * (i != 3))
            for i, name in enumerate(names(count))
        ]  # fmt: skip
        demo_results.draw(tmp_path / "a.png", batch, results, "int8", 100)
        rows = [
            {"phase": "decode", "batch": "2 x 3", "heads": 16, "implementation": name,
             "ms": "refused: $_" if i == 3 else self.value(i, count)}
            for i, name in enumerate(names(count))
        ]  # fmt: skip
        demo_served.draw(tmp_path / "b.png", rows, "a_$ device")

    def test_accuracy(self, tmp_path, monkeypatch, count):
        errors = [
            {"distribution": name, "hard": False} | {n: self.value(i, count) for n in names(count)}
            for i, name in enumerate(names(min(count, 8)))
        ]
        monkeypatch.setattr(int8_accuracy, "SHOWN", names(count))
        spreads = [row | {"distribution": "1"} for row in errors]
        int8_accuracy.draw(tmp_path / "a.png", errors, spreads)
        monkeypatch.setattr(amla_accuracy, "METHODS", dict.fromkeys(names(min(count, 12))))
        rows = [
            {"distribution": "N(0, 1)" if i % 2 else "ramp", "rise": 1.0, "rescales": 3}
            | {n: self.value(i, count) for n in names(count)}
            for i in range(min(count, 4))
        ]
        amla_accuracy.draw(tmp_path / "b.png", rows)
        cells = [
            {"implementation": name, "dtype": "float32", "page_size": 1, "layout": "ND",
             "error": None if i == 3 else self.value(i, count)}
            for i, name in enumerate(names(count))
        ]  # fmt: skip
        correctness.draw(tmp_path / "c.png", cells, names(count))

    def test_machines(self, tmp_path, count):
        rows = [
            {"table": "a_$.csv", "label": name, "quantity": "us", "error_percent": 1.0,
             "published": 1.0, "predicted": self.value(i, count)}
            for i, name in enumerate(names(count))
        ]  # fmt: skip
        published.draw(tmp_path / "a.png", rows)
        knobs = [
            {"knob": name, "value": 1.0, "us": None if i == 3 else self.value(i, count),
             "default": 1.0}
            for i, name in enumerate(names(min(count, 4) or 1))
        ]  # fmt: skip
        sweep._draw(Output(tmp_path), "a_$ " * 99, knobs)


def test_looks_differ_and_names_show():
    looks = [plotting.look(i) for i in range(81)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 81
    plotting.look(10_000)
    for text in names(9):
        label = plotting.name(text)
        assert len(label) <= plotting.LONGEST_NAME + 1
        assert not label.startswith("_")
        assert "\n" not in label


KERNELS = [
    ("H200_SXM", "seesaw"), ("H200_SXM", "fa3"), ("H200_SXM", "triton-split"),
    ("Ascend910B1", "chunk4"), ("Ascend910B1", "amla"), ("Ascend910B1", "serial"),
]  # fmt: skip


@pytest.mark.parametrize(("device", "kernel"), KERNELS)
def test_busy_and_idle_of_the_matrix_unit_add_up(device, kernel):
    report = simulate(PROFILES[device], Problem((2048,) * 132, 128), kernel)
    row = report_row(report)
    bubbles = {key: share for key, share in row.items() if key.startswith("bubble_")}
    assert len(bubbles) == 4
    assert row["utilisation"] + sum(bubbles.values()) == pytest.approx(1)
    engine = "cube" if device.startswith("Ascend") else "tensor"
    assert row["utilisation"] == report.engine_share[engine]
    (line,) = (line for line in describe(report) if line.startswith("matrix unit of a core"))
    assert f"busy {row['utilisation']:.1%}, idle {sum(bubbles.values()):.1%}" in line
