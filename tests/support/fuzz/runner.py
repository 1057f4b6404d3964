"""Compiles the programs of cases, runs calls and says what is wrong."""

import dataclasses
import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import paged_mla_attention, plan_fixed, plan_splits

from . import forms, judge
from .arrays import noise_shapes, operands
from .calls import Call, draw_call
from .cases import INTERPRETED, Case, Limits, draw_case

ERRORS = ("o", "value", "lse")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Where the cases come from: everything that a seed does not say."""

    implementations: tuple[str, ...]  # drawn from with equal weight
    limits: Limits

    def case(self, seed: int, index: int) -> Case:
        rng = np.random.default_rng([seed, 0, index])
        return draw_case(rng, str(rng.choice(self.implementations)), self.limits)


def draw(case: Case, seed: int, index: int, odd: float = 0.3) -> Call:
    """Call number `index` of a data seed."""
    return draw_call(np.random.default_rng([seed, 1, index]), case, odd)


@dataclasses.dataclass
class Outcome:
    """The outcome of one call."""

    name: str  # "shape seed.case/data seed.call", for `replay`
    case: Case
    failures: list[str]
    worst: dict[str, float] = dataclasses.field(default_factory=dict)  # errors over their bounds
    features: Counter[str] = dataclasses.field(default_factory=Counter)
    crashed: bool = False  # CUDA's context is lost
    ran: bool = True  # False: the process had ended before

    def line(self) -> str:
        features = ", ".join(f"{count} {what}" for what, count in self.features.items() if count)
        return (
            f"FAILED {self.name}: {'; '.join(self.failures)} [{self.case}; {features or 'plain'}]"
        )


class Program:
    """The op, and on a GPU what makes its operands and judges its results, compiled for a case."""

    def __init__(self, case: Case, *, on_device: bool):
        self.case, self.on_device = case, on_device
        self._op = jax.jit(functools.partial(call_op, case))
        if on_device:
            self._make = jax.jit(functools.partial(_make, case))
            self._judge = jax.jit(functools.partial(_judge, case))

    def compile(self) -> None:
        """Compiles by a first call, so that nothing is left to be done by the second."""
        self.run(draw(self.case, 0, 0))

    def run(self, call: Call) -> tuple[dict[str, np.ndarray], bool]:
        """What `judge` says, and whether a second call gave the same bits."""
        case = self.case
        given = {
            "block_tables": call.block_tables, "seq_lens": call.seq_lens,
            "query_lens": call.query_lens, "valid": call.valid,
        }  # fmt: skip
        made = {
            "stored": call.stored, "query_lens": call.query_lens, "nan_query": call.nan_query,
            "deviation": np.float32(call.deviation), "key_size": np.float32(call.key_size),
        }  # fmt: skip
        if self.on_device:
            q, arrays = self._make(jax.random.key(call.seed, impl="rbg"), made)
        else:
            rng = np.random.default_rng(call.seed)
            noise = {
                name: rng.standard_normal(shape, np.float32)
                for name, shape in noise_shapes(case).items()
            }
            with np.errstate(over="ignore", invalid="ignore"):
                q, arrays = operands(np, case, noise, **made)
        lengths = call.query_lens if case.ragged else None
        times = 1 if case.implementation == INTERPRETED else 2  # it takes seconds a call
        layer = call.seed % case.num_layers
        results = [
            self._op(q, arrays, call.block_tables, call.seq_lens, lengths, np.int32(layer))
            for _ in range(times)
        ]
        if self.on_device:
            with jax.enable_x64(True):
                found, same = self._judge(q, arrays, given, results)
            return jax.tree.map(np.asarray, found), bool(same)
        results = [{name: np.asarray(x) for name, x in result.items()} for result in results]
        with np.errstate(over="ignore", invalid="ignore"):
            found = judge.judge(np, case, q, arrays, given, results[0])
        same = all(bits(np, results[0][name], results[-1][name]) for name in results[0])
        return found, same


def call_op(
    case: Case, q: Any, arrays: Any, tables: Any, seq_lens: Any, query_lens: Any, layer: Any
) -> Any:
    """{"o", "lse"} of one call with traced lengths, its plan made inside."""
    cache = forms.cache_of(case, arrays, layer)
    lengths = jnp.clip(seq_lens, 0, case.longest)  # as a caller who plans for them may do
    plan = make_plan(case, lengths, query_lens)
    partial_dtype = None if case.partial_dtype is None else jnp.dtype(case.partial_dtype)
    options = {"softmax_scale": case.softmax_scale, "causal": case.causal}
    if case.implementation == INTERPRETED:
        return _interpreted(case, q, cache, tables, seq_lens, query_lens, plan, partial_dtype)
    lens = {"query_lens": query_lens}
    if case.packed:
        q, lens = forms.packed(case, q, query_lens)
    result = paged_mla_attention(
        forms.parts(case, q), cache, tables, seq_lens, plan=plan, rescale=case.rescale,
        partial_dtype=partial_dtype, implementation=case.implementation,
        return_lse=case.return_lse, **lens, **options,
    )  # fmt: skip
    results = dict(zip(("o", "lse"), result, strict=True)) if case.return_lse else {"o": result}
    return forms.unpacked(case, results, query_lens) if case.packed else results


def make_plan(case: Case, lengths: Any, query_lens: Any) -> Any:
    tokens = {}
    if case.causal and case.workers % 2:  # A plan without query_lens is for any.
        tokens = {"query_lens": query_lens, "num_heads": case.heads}
    sizes: dict[str, Any] = {"rows": case.rows, "num_workers": case.workers}
    sizes |= {"rows_per_tile": case.rows_per_tile, "block_size": case.block_size}
    if case.plan == "splits":
        sizes |= {"in_pairs": case.in_pairs, "overhead": 1 + case.workers % 5}
        return plan_splits(lengths, **sizes, **tokens)
    if case.plan == "fixed":
        return plan_fixed(lengths, split_size=case.split_size, max_seq_len=case.longest, **sizes)
    if case.plan == "decode":
        from pallas_kernels.hopper.planning import plan_decode

        return plan_decode(
            lengths,
            case.rows,
            capacity=case.capacity,
            cache=case.kind,
            rescale=case.rescale,
            kv_lora_rank=case.rank,
            rope_dim=case.width - case.rank,
            **tokens,
        )
    return None


def _interpreted(
    case: Case, q: Any, cache: Any, tables: Any, seq_lens: Any, query_lens: Any, plan: Any,
    partial_dtype: Any,
) -> dict[str, Any]:  # fmt: skip
    """The Hopper kernels as the op calls them, under the interpreter."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.hopper import attention

    rows = forms.parts(case, q.reshape(case.batch, case.rows, case.width))
    work = (tables, seq_lens, query_lens, plan)
    options: dict[str, Any] = {
        "num_heads": case.heads, "softmax_scale": case.softmax_scale, "causal": case.causal,
        "partial_dtype": partial_dtype, "interpret": plgpu.InterpretGPUParams(),
    }  # fmt: skip
    if case.kind == "int8":
        o, lse = attention.attend_int8(
            rows, cache.pages, cache.rope_pages, cache.scales, *work, **options
        )
    else:
        options |= {"kv_lora_rank": case.rank, "rescale": case.rescale}
        o, lse = attention.attend(rows, cache.pages, *work, **options)
    shape = (case.batch, case.tokens, case.heads)
    return {"o": o.reshape(*shape, case.rank), "lse": lse.reshape(shape)}


def bits(xp: Any, a: Any, b: Any) -> Any:
    """Whether two arrays hold the same bits, but for which NaN a NaN is."""
    return ((a == b) | (xp.isnan(a) & xp.isnan(b))).all()


def _make(case: Case, key: Any, made: dict[str, Any]) -> Any:
    keys = jax.random.split(key, 3)
    noise = {
        name: jax.random.normal(key, shape, jnp.float32)
        for key, (name, shape) in zip(keys, noise_shapes(case).items(), strict=True)
    }
    return operands(jnp, case, noise, **made)


def _judge(case: Case, q: Any, arrays: Any, given: Any, results: Any) -> Any:
    found = judge.judge(jnp, case, q, arrays, given, results[0])
    same = [bits(jnp, results[0][name], results[1][name]) for name in results[0]]
    return found, jnp.all(jnp.stack(same))


def run_call(program: Program, name: str, call: Call) -> Outcome:
    """Runs one call; an exception is a failure of it."""
    case, crashed = program.case, False
    failures: list[str] = []
    worst = dict.fromkeys(ERRORS, 0.0)
    try:
        found, same = program.run(call)
    except Exception as error:
        failures.append(f"{type(error).__name__}: {str(error)[:300]}")
        crashed = "CUDA_ERROR" in str(error)
    else:
        failures += _failures(case, found)
        worst = {error: float(found[error].max()) for error in ERRORS}
        if not same:
            failures.append("a second call gave other bits")
    return Outcome(name, case, failures, worst, call.features, crashed)


def _failures(case: Case, found: dict[str, np.ndarray]) -> list[str]:
    """In words: how many rows, and where the first or the worst is."""
    failures = []

    def at(place: Any) -> str:
        request, row = place
        return f"request {request} token {row // case.heads} head {row % case.heads}"

    if found["place"].any():
        wrong = np.argwhere(found["place"])
        failures.append(f"NaN, infinity or 0 misplaced in {len(wrong)} rows, first {at(wrong[0])}")
    for error in ERRORS:
        over = ~(found[error] <= 1)
        if over.any():
            worst = np.unravel_index(np.argmax(np.where(over, found[error], 0)), over.shape)
            failures.append(
                f"{error} off by {found[error][worst]:.3g} times its bound in {over.sum()} rows, "
                f"worst {at(worst)}"
            )
    return failures
