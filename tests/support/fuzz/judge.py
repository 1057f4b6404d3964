"""The float64 reference and the rule for passing; in numpy, or traced with `xp=jax.numpy`.

It shares no code with the library. One request at a time, so that memory stays small.

The rule. Infinite and NaN places must be those of the reference, and rows without a key exactly 0
and -inf. For the others errors are bounded, row by row, by what the formats in use must cost. Let
u(t) be the unit roundoff of a type (2^-8 bfloat16, 2^-11 float16, 2^-24 float32), p the softmax
weights, v the values, and spread = sqrt(sum p_i^2 |v_i|^2), the size of o had the v_i no common
part. Independent errors of relative size e in the p_i change o by e * spread.
- Scores are sums of exact products in float32. They are off by SUM_ERROR * u(float32) times their
  size |scale * q| |k| / sqrt(D), D values of no common direction, and by a rounding or two of the
  largest score. An int8 kernel rounds q's latent part to 14 bits, in steps of amax / 2^12 at most,
  which costs scale * step / sqrt(12) * |k_latent|. `logit` is their sum, for one key. A row's lse
  is off by TAIL * logit at most, and its weights by as much, relatively, so that o is off by that
  times (spread + |o|).
- P is rounded to the values' type (int8 kernels: bfloat16), partial outputs to the partials'
  type: each u * (spread + |o|), once more u(P) for AMLA, whose residual is rounded to P's type as
  well. The output is rounded to q's type: u * |o|.
- The rest (exponentials, sums of P and P V, log) is float32: REST * u(float32).
Each u is the largest error of a rounding, whose root mean square is less than half as much: in a
row's norm over all columns the rule has that margin. A single value may be off by PEAK times a
row's root mean square.
"""

from typing import Any

import numpy as np

from .arrays import address
from .cases import INTERPRETED, Case

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
SUM_ERROR = 16.0
TAIL = 5.0  # standard deviations
REST = 32.0
PEAK = 6.0
SUBNORMAL = {"bfloat16": 2.0**-133, "float16": 2.0**-25, "float32": 2.0**-149}


def judge(
    xp: Any,
    case: Case,
    q: Any,
    arrays: dict[str, Any],
    call: dict[str, Any],
    results: dict[str, Any],
) -> dict[str, Any]:
    """What is wrong with results, {"o", "lse"} (no lse where none was asked for).

    call: seq_lens, query_lens, valid and block_tables.
    Returns arrays [B, R]: "place" (bool: NaN, infinity or 0 in the wrong place), and errors over
    what they may be, "o", "value" (the largest of a row) and "lse", 0 where `place` says enough.
    """
    tokens = token_rows(case, arrays)

    def one(request: tuple) -> dict[str, Any]:
        table, length, queries, valid, q, results = request
        wanted = attend(xp, case, tokens, table, length, queries, valid, q)
        return compare(xp, case, wanted, results)

    rows = {name: x.reshape(case.batch, case.rows, *x.shape[3:]) for name, x in results.items()}
    requests = (
        call["block_tables"], call["seq_lens"], call["query_lens"], call["valid"],
        q.reshape(case.batch, case.rows, case.width), rows,
    )  # fmt: skip
    if xp is not np:
        import jax

        return jax.lax.map(one, requests)
    each = [one((*(x[i] for x in requests[:5]), {k: x[i] for k, x in rows.items()}))
            for i in range(case.batch)]  # fmt: skip
    return {name: np.stack([found[name] for found in each]) for name in each[0]}


def token_rows(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    """Every array of the cache as rows [num_pages * page_size, width], as they are stored."""
    tokens = case.num_pages * case.page_size
    rows = {}
    for name, array in arrays.items():
        if name == "scales":
            rows[name] = array.reshape(tokens, -1) if array.ndim else array
            continue
        itemsize = array.dtype.itemsize
        width = array.size // tokens
        flat = array.reshape(case.num_pages, -1)
        if case.layout == "NZ":
            flat = flat[:, address("NZ", case.page_size, width, itemsize)]
        rows[name] = flat.reshape(tokens, width)
    return rows


def attend(
    xp: Any, case: Case, tokens: dict[str, Any], table: Any, length: Any, queries: Any,
    valid: Any, q: Any,
) -> dict[str, Any]:  # fmt: skip
    """The attention of one request in float64, and the sizes that bounds are made of.

    table [max_pages], q [R, D]. Returns o [R, rank]; by row lse, `nan`, `none` (sees no key that
    counts), `spread`, `logit`, `steps`.
    """
    float64, position = xp.float64, xp.arange(case.longest)
    given = queries  # Rows past these don't exist where tokens are packed.
    length, queries = xp.where(valid, length, 0), xp.where(valid, queries, 0)
    exists = position < length
    page = xp.where(exists, table[xp.minimum(position // case.page_size, case.max_pages - 1)], 0)
    place = page * case.page_size + position % case.page_size
    keys = tokens["pages"][place].astype(float64)
    steps_of_p = case.kind == "int8" and case.implementation == "blockwise"
    if case.kind == "int8":
        scales = tokens["scales"]
        if scales.ndim:
            scales = xp.repeat(scales[place], case.rank // scales.shape[1], axis=1)
        scales = scales.astype(float64)
        latent = keys * scales
        keys = xp.concatenate([latent, tokens["rope_pages"][place].astype(float64)], axis=1)
    is_nan, is_low = xp.isnan(keys).any(axis=1), (keys == -xp.inf).any(axis=1)
    keys = xp.where(xp.isfinite(keys), keys, 0.0)
    q = q.astype(float64)
    nan_query = ~xp.isfinite(q).all(axis=1)
    q = xp.where(xp.isfinite(q), q, 0.0)

    token = xp.arange(case.rows) // case.heads
    sees_to = length - queries + token + 1 if case.causal else xp.zeros_like(token) + length
    sees_to = xp.where(token < queries, sees_to, 0)
    sees = (position < sees_to[:, None]) & exists
    counts = sees & ~is_low
    scores = xp.where(counts, case.softmax_scale * (q @ keys.T), -xp.inf)
    none = ~counts.any(axis=1)
    top = xp.where(none, 0.0, scores.max(axis=1))
    weights = xp.exp(scores - top[:, None])
    total = xp.where(none, 1.0, weights.sum(axis=1))
    weights = weights / total[:, None]
    latent = keys[:, : case.rank]
    lse = xp.where(none, -xp.inf, top + xp.log(total))
    o = weights @ latent
    spread = xp.sqrt(weights**2 @ (latent**2).sum(axis=1))

    scale, seen = case.softmax_scale, exists & ~is_nan
    key_norm = xp.sqrt(xp.where(seen, (keys**2).sum(axis=1), 0.0).max())
    latent_norm = xp.sqrt(xp.where(seen, (latent**2).sum(axis=1), 0.0).max())
    size = scale * xp.sqrt((q**2).sum(axis=1)) * key_norm / case.width**0.5
    logit = UNIT["float32"] * (SUM_ERROR * size + 2 * xp.abs(top))
    if steps_of_p or (case.kind == "int8" and case.implementation in ("hopper", INTERPRETED)):
        step = xp.abs(q[:, : case.rank]).max(axis=1) / (127 if steps_of_p else 2**12)
        logit = logit + scale * step / 12**0.5 * latent_norm
    steps = xp.zeros_like(lse)
    if steps_of_p:
        per_key = xp.broadcast_to(scales, latent.shape)[:, 0]
        folded = weights * xp.where(seen, per_key, 0.0)
        rounded = xp.minimum(folded, folded.max(axis=1, keepdims=True) / 254)
        whole = xp.where(seen, (latent**2).sum(axis=1) / per_key**2, 0.0)
        steps = xp.sqrt(rounded**2 @ whole)
    sees_any = sees.any(axis=1)
    invalid = ~valid & ((token < given) if case.packed else xp.ones_like(sees_any))
    nan = (nan_query & sees_any) | (sees & is_nan).any(axis=1) | invalid
    sizes = {"spread": spread, "logit": logit, "steps": steps}
    return {"o": o, "lse": lse, "nan": nan, "none": none & ~nan, **sizes}


def compare(xp: Any, case: Case, wanted: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """As `judge`, for the rows of one request."""
    o = results["o"].astype(xp.float64)
    finite = ~(wanted["nan"] | wanted["none"])
    place = wanted["nan"] & ~xp.isnan(o).all(axis=1)
    place = place | (wanted["none"] & (o != 0).any(axis=1))
    place = place | (finite & ~xp.isfinite(o).all(axis=1))
    off = xp.where((finite & ~place)[:, None], o - wanted["o"], 0.0)
    output_norm = xp.sqrt((wanted["o"] ** 2).sum(axis=1))
    rounded = UNIT[case.q_dtype] * output_norm + SUBNORMAL[case.q_dtype] * case.rank**0.5
    relative = weight_error(case) + TAIL * wanted["logit"]
    bound = rounded + relative * (wanted["spread"] + output_norm) + wanted["steps"]
    found = {
        "place": place,
        "o": xp.sqrt((off**2).sum(axis=1)) / bound,
        "value": xp.abs(off).max(axis=1) / (PEAK * bound / case.rank**0.5),
    }
    if "lse" in results:
        lse = results["lse"].astype(xp.float64)
        wrong = (wanted["nan"] & ~xp.isnan(lse)) | (wanted["none"] & (lse != -xp.inf))
        wrong = wrong | (finite & ~xp.isfinite(lse))
        found["place"] = place | wrong
        lse, expected = (xp.where(finite & ~wrong, x, 0.0) for x in (lse, wanted["lse"]))
        off, largest = xp.abs(lse - expected), xp.abs(expected)
        found["lse"] = off / (TAIL * wanted["logit"] + UNIT["float32"] * (REST + 2 * largest))
    else:
        found["lse"] = xp.zeros_like(found["o"])
    return found


def weight_error(case: Case) -> float:
    """The relative error of o, in units of spread + |o|, that P's and the partials' types cost."""
    kernel = case.implementation in ("hopper", INTERPRETED)
    error = REST * UNIT["float32"]
    if case.implementation != "reference" and (kernel or case.kind == "float"):
        of_p = UNIT["bfloat16" if case.kind == "int8" else case.cache_dtype]
        error += of_p * (2 if case.rescale == "exponent_add" else 1)
    if kernel:  # None: float16 at the least
        error += UNIT[case.partial_dtype or "float16"]
    elif case.implementation == "split_kv":
        error += UNIT[case.partial_dtype or "float32"]
    return error
