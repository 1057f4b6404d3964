"""The end of an online softmax: O and the sum of P become o and lse, alike in all decode kernels.

P is 2^(s - m), where s is a score and m the running maximum of its row, both in log2 units. So a
row's output is O / total and its lse is ln(2) * m + ln(total), where total is the sum of its P.
"""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.hopper.work_items import LN2, LOG2E

LAZY_GROWTH = 8.0  # log2 units by which m may lag behind the true maximum, so that O is kept


def nan_if_invalid(kv_len: Any, invalid: Any) -> Any:
    """Returns what to add to results: NaN where the request or its plan is invalid, else 0.

    kv_len: from `DecodeCall.lengths`. invalid: the loader's flag of the work item.
    """
    return jnp.where((kv_len < 0) | invalid, jnp.nan, 0.0)


def divided(weight: Any, total: Any) -> Any:
    """Returns weight / total, the factor of O; 0 for rows that see no key."""
    return jnp.where(total != 0.0, weight / total, 0.0)


def natural_lse(m: Any, total: Any, *, log2_sum: bool) -> Any:
    """Returns lse, a natural logarithm; -inf for rows that see no key.

    log2_sum: how the result is rounded. True adds m and log2(total) and converts their sum. The
        compiler can form one fused multiply-add of it only, so all programs round it alike. False
        converts m and adds ln(total), as the kernels over an int8 cache do.
    """
    lse = (m + jnp.log(total) * LOG2E) * LN2 if log2_sum else m * LN2 + jnp.log(total)
    return jnp.where(total != 0.0, lse, -jnp.inf)
