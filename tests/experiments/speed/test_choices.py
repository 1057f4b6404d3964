"""`choices`: which shapes and tiles are timed, and how near a choice is to the best."""

import dataclasses
import json

import jax
import pytest

from experiments.simulated.our_tiles import measured_times, name_of, our_candidates, won
from experiments.speed.decode.pools import Pool
from experiments.speed.decode.programs import Work
from experiments.speed.decode.setup import Setup
from experiments.speed.shapes import Shape
from experiments.speed.tiles.choices import (
    headline_of,
    rank_correlation,
    row_of,
    session_words,
    words,
)
from experiments.speed.tiles.drawn import MOST_TOKENS, SEED, Tilings, drawn
from mla_jax.hal import PROFILES, Problem

H200 = PROFILES["H200_SXM"]
SHAPE = Shape(2, "bf16", 20, 2, 64, "uniform", 300)


def test_shapes_are_those_of_the_issue() -> None:
    shapes = drawn(SEED, 60)
    assert shapes == drawn(SEED, 60) != drawn(SEED + 1, 60)
    assert len(set(shapes)) == 60
    for axis, least, most in (("heads", 8, 128), ("batch", 1, 512), ("kv_len", 64, 65536)):
        values = [getattr(shape, axis) for shape in shapes]
        assert least <= min(values) < 2.5 * least
        assert most / 2.5 < max(values) <= most
    assert {(shape.s_q, shape.lengths) for shape in shapes} == {
        (tokens, kind) for tokens in (1, 2) for kind in ("uniform", "varlen")
    }
    assert any(shape.heads % 8 for shape in shapes)
    assert max(sum(shape.seq_lens) for shape in shapes) <= MOST_TOKENS


def test_each_tiling_gets_its_own_plan() -> None:
    tilings = Tilings.of(SHAPE, H200, 4096)
    assert tilings.source == "measured"
    first, *others = tilings.contenders()
    assert first.name == tilings.chosen
    assert len({who.name for who in (first, *others)}) == len(tilings.configs) > 10
    simulated = [tilings.simulated[who.name] for who in others]
    assert simulated == sorted(simulated)
    setup = Setup(1 << 30)
    work = Work(SHAPE, Pool.of([SHAPE], setup), setup)
    for who in (first, others[-1]):
        plan = jax.eval_shape(work.planner(who), work.seq_lens)
        assert plan.tiles == tilings.configs[who.name]
        assert plan.split.rows_per_tile == who.tiles.rows_per_tile
    default = jax.eval_shape(work.planner(first.__class__("hopper", first.options)), work.seq_lens)
    assert name_of(default.tiles) == tilings.chosen


def test_exact_block_tables_reach_no_further_than_the_requests() -> None:
    setup, rows = Setup(1 << 30), [SHAPE, dataclasses.replace(SHAPE, kv_len=3000)]
    pool = Pool.of(rows, setup)
    assert [Work(row, pool, setup).capacity for row in rows] == [3072, 3072]
    exact = dataclasses.replace(setup, exact_tables=True)
    assert [Work(row, pool, exact).capacity for row in rows] == [384, 3072]


def test_a_choice_is_compared_with_the_best_that_was_timed() -> None:
    tilings = Tilings(dict.fromkeys("abcd"), {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, "b", "table")
    near = row_of(SHAPE, tilings, {"a": 12.0, "b": 10.2, "c": 10.0})
    assert (near["best"], near["us"], near["simulated"]) == ("c", 10.2, "a")
    assert near["distance"] == pytest.approx(0.02)
    assert near["simulated_distance"] == pytest.approx(0.2)
    assert near["simulated_gain"] == 1
    assert near["rank_correlation"] == pytest.approx(-1)
    far = row_of(SHAPE, tilings, {"a": 10.0, "b": 11.0})
    nothing = row_of(SHAPE, tilings, {})
    assert (nothing["distance"], nothing["best_us"]) == (None, None)
    found = headline_of([near, far, nothing])
    assert (found["chosen_near"], found["chosen_timed"], found["simulated_near"]) == (1, 2, 1)
    assert found["chosen_worst"] == pytest.approx(0.1)
    assert found["chosen_mean"] == pytest.approx((1.02 * 1.1) ** 0.5 - 1)
    said = words(found, 3)
    assert "chosen: 1 of 2 within 3% of the best" in said
    assert "rank correlation of simulated and measured times -1.00" in said
    assert "nothing timed" in words(headline_of([nothing]), 1)


def test_rows_are_committed_with_a_date_a_card_and_a_commit() -> None:
    environment = {"versions": {"commit": "abc1234", "jax": "0"}, "devices": ["NVIDIA H200"]}
    session = {"started": "2026-12-01T05:02:35+00:00", "environment": environment}
    wanted = {"date": "2026-12-01", "gpu": "NVIDIA H200", "commit": "abc1234"}
    assert session_words(session) == wanted


def test_ranks() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 21]) == pytest.approx(1)
    assert rank_correlation([1.0, 1.00001, 3], [5, 7, 9]) == pytest.approx(0.866, abs=1e-3)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1, 2], [1, 2]) is None


def test_best_says_what_was_measured(tmp_path) -> None:
    problem = Problem((1024,) * 16, 128)
    kernels, usual = our_candidates(H200, problem)
    best = next(name for name in kernels if name != usual)
    row = {"heads": 128, "s_q": 1, "batch": 16, "lengths": "uniform", "kv_len": 1024}
    rows = [row | {"tiles": best, "us": 20.0}, row | {"tiles": usual, "us": 21.0}]
    rows += [r | {"kv_len": 2048, "us": 1.0} for r in rows] + [rows[0] | {"heads": 64, "us": 2.0}]
    (tmp_path / "h200_choices.json").write_text(json.dumps({"device": H200.name, "rows": rows}))
    us = measured_times(H200, problem, tmp_path)
    assert us == {best: 20.0, usual: 21.0}
    assert won(best, usual, us) == "measured: 20.0 against 21.0 us, +5.0%"
    assert measured_times(PROFILES["H20"], problem, tmp_path) == {}
    assert won(best, usual, {}) == "not measured on this device"
    assert our_candidates(PROFILES["L40"], problem) == ({}, None)
