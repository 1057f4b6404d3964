"""The operands of a call, from random values: in numpy, or traced with `xp=jax.numpy`."""

from typing import Any

import ml_dtypes  # noqa: F401  (numpy then knows bfloat16)
import numpy as np

from .calls import HIDDEN_NAN, MINUS_INF, UNUSED
from .cases import Case

INT8_STEPS = 40  # of a value of 1


def noise_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Shapes of the standard normal float32 values that `operands` takes, by name."""
    tokens = (case.num_pages, case.page_size)
    return {
        "q": (case.batch, case.tokens, case.heads, case.width),
        "kv": (*tokens, case.width),
        "size": (*tokens, 4),
    }


def address(layout: str, page_size: int, width: int, itemsize: int) -> np.ndarray:
    """[page_size, width]: where each value of a page stands in it, counted in values."""
    token, column = np.arange(page_size)[:, None], np.arange(width)
    if layout == "ND":
        return token * width + column
    c0 = 32 // itemsize
    return (column // c0 * page_size + token) * c0 + column % c0


def operands(
    xp: Any,
    case: Case,
    noise: dict[str, Any],
    *,
    stored: Any,
    query_lens: Any,
    nan_query: Any,
    deviation: Any,
    key_size: Any,
) -> tuple[Any, dict[str, Any]]:
    """q [B, S, H, D] and the arrays of the cache, by name.

    Tokens differ in size. The first rope value of every query row is positive, so that a key with
    -inf there scores -inf. Rows of q past query_lens and unused tokens are NaN.
    """
    float32 = xp.float32
    size = xp.exp2(xp.clip(noise["size"], -2.0, 1.0)) * key_size
    kv = noise["kv"] * size[..., :1]
    latent, rope = kv[..., : case.rank], kv[..., case.rank :]
    first = xp.arange(case.rope) == 0
    rope = xp.where((stored == MINUS_INF)[..., None] & first, -xp.inf, rope)
    lost = ((stored == UNUSED) | (stored == HIDDEN_NAN))[..., None]
    rope = xp.where(lost, xp.nan, rope).astype(float32)
    arrays: dict[str, Any] = {}
    if case.kind == "float":
        rows = xp.concatenate([xp.where(lost, xp.nan, latent), rope], axis=-1)
        arrays["pages"] = _in_layout(xp, case, rows.astype(case.cache_dtype))
    else:
        steps = xp.clip(xp.rint(noise["kv"][..., : case.rank] * INT8_STEPS), -127, 127)
        arrays["pages"] = _in_layout(xp, case, steps.astype(xp.int8))
        arrays["rope_pages"] = _in_layout(xp, case, rope.astype("bfloat16"))
        if case.granularity == "tensor":
            arrays["scales"] = xp.asarray(key_size / INT8_STEPS, dtype=float32)
        else:
            groups = 1 if case.granularity == "token" else case.rank // 128
            scales = xp.where(lost, xp.nan, size[..., :groups] / INT8_STEPS).astype(float32)
            arrays["scales"] = scales[..., 0] if case.granularity == "token" else scales

    # The scores' deviation is that of q times that of the keys times sqrt(D) times the scale.
    factor = deviation / (case.softmax_scale * key_size * case.width**0.5)
    q = noise["q"] * xp.minimum(float32(factor), float32(8000.0))  # float16 ends at 65504
    is_first = xp.arange(case.width) == case.rank
    q = xp.where(is_first, xp.maximum(xp.abs(q), float32(1e-3)), q)
    real = (xp.arange(case.tokens) < query_lens[:, None])[..., None]
    q = xp.where((real & ~nan_query)[..., None], q, xp.nan)
    return q.astype(case.q_dtype), arrays


def _in_layout(xp: Any, case: Case, rows: Any) -> Any:
    """[num_pages, page_size, width] as the cache of that layout holds it."""
    if case.layout == "ND":
        return rows
    width, c0 = rows.shape[-1], 32 // rows.dtype.itemsize
    of_place = np.argsort(address("NZ", case.page_size, width, rows.dtype.itemsize).ravel())
    flat = rows.reshape(case.num_pages, -1)[:, of_place]
    return flat.reshape(case.num_pages, width // c0, case.page_size, c0)
