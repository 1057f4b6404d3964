"""What the decode benchmarks time: shapes, pools of caches, and inputs."""

import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_runs import SETUP

from experiments.speed import kernel_bench
from experiments.speed.decode import pools
from experiments.speed.decode.inputs import Inputs
from experiments.speed.decode.pools import Pool
from experiments.speed.decode.programs import Work
from experiments.speed.decode.setup import Setup
from experiments.speed.shapes import HEADS, PRESETS, preset, shapes


class TestShapes:
    def test_standard_is_within_its_limits_and_on_the_grid(self):
        rows = preset("standard")
        assert 80 < len(rows) <= 200
        assert set(rows) <= set(preset("full"))
        for axis, values in {
            "heads": HEADS, "s_q": (1, 2, 4), "batch": (1, 4, 16, 64, 128),
            "kv_len": (1024, 4096, 16384, 65536), "page_size": (1, 16, 64, 128),
            "lengths": ("uniform", "varlen"), "dtype": ("bf16", "int8"),
        }.items():  # fmt: skip
            assert {getattr(row, axis) for row in rows} == set(values), axis

    def test_standard_holds_every_row_that_has_a_bar(self):
        assert set(preset("bars")) <= set(preset("standard"))
        for bar in kernel_bench.BARS:
            assert any(bar.concerns(row) for row in preset("bars")), bar.work

    @pytest.mark.parametrize("name", [name for name in PRESETS if name != "full"])
    def test_presets_fit_an_h200(self, name):
        setup = Setup(60 << 30)
        for row in preset(name):
            assert pools.lacks_memory(row, setup) is None

    def test_labels_tell_all_rows_apart(self):
        assert len({row.label for row in preset("full")}) == len(preset("full"))


class TestPools:
    def test_few_short_requests_have_short_tables(self):
        setup = Setup(60 << 30)

        def work(batch, kv_len):
            rows = list(shapes((16,), (1,), (batch,), (1024, kv_len, 65536)))
            row = next(row for row in rows if row.kv_len == kv_len)
            return Work(row, Pool.of(rows, setup), setup)

        assert [work(*row).capacity for row in ((1, 4096), (4, 4096))] == [4096, 4096]
        assert [work(*row).capacity for row in ((1, 16384), (16, 4096))] == [65536, 65536]
        assert work(1, 4096).key != work(1, 16384).key == work(1, 65536).key
        assert work(1, 4096).tables.shape == (1, 64)

    def test_the_smallest_row_rotates_past_l2_and_the_largest_fits(self):
        rows = list(shapes((16,), (1,), (1, 1), (1024, 16384)))
        pool = Pool.of(rows, Setup(60 << 30))
        assert (pool.tokens, pool.capacity, pool.layers) == (16384, 16384, 128)
        large = Pool.of(list(shapes(kv_len=(1024, 16384))), Setup(60 << 30))
        assert large.layers == 12
        assert large.tokens * large.layers * 1152 <= 60 << 30

    def test_a_row_too_large_is_refused_with_its_reason(self):
        row = next(shapes(kv_len=(65536,)))
        assert "layers of its cache take 36.0 GiB" in pools.lacks_memory(row, Setup(30 << 30))

    @pytest.mark.parametrize("page_size", [1, 16, 64])
    def test_inputs_lie_where_the_block_table_says(self, page_size):
        row = next(shapes((2,), (1,), (3,), (100,), ("varlen",), (page_size,)))
        pool = Pool.of([row], SETUP)
        inputs = Inputs.make(row, SETUP, pool.fill(SETUP), pool.capacity)
        used = [
            page
            for table, length in zip(inputs.tables, row.seq_lens, strict=True)
            for page in table[: -(-length // page_size)]
        ]
        assert len(set(used)) == len(used)
        for request, length in enumerate(row.seq_lens):
            got = inputs.rows_of(request, 1)
            flat = np.asarray(inputs.layers[1]["pages"]).astype(np.float64)
            page = inputs.tables[request, (length - 1) // page_size]
            assert got.shape == (length, 48)
            np.testing.assert_array_equal(
                got[-1], flat[page * page_size + (length - 1) % page_size]
            )

    def test_int8_layers_are_within_half_a_step_of_normal_numbers(self):
        row = next(shapes((2,), (1,), (2,), (128,), dtype=("int8",)))
        layer, *_ = Pool.of([row], SETUP).fill(SETUP)
        assert layer["pages"].dtype == jnp.int8
        assert int(jnp.abs(layer["pages"]).max()) == 127
        values = np.asarray(layer["pages"]) * np.asarray(layer["scales"])[:, None]
        assert 0.8 < values.std() < 1.2
        assert SETUP.token_bytes("int8") == 32 + 2 * 16 + 4
