"""What an implementation of an attention op is, and what it is asked."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from mla_jax.cache import PagedKVCache
from mla_jax.hal import HardwareProfile
from mla_jax.ragged.queries import AnyQueries
from mla_jax.sharding.target import Target
from mla_jax.splits.decode_plan import DecodePlan


class Problem(Protocol):
    """One checked call of an op; a pytree of arrays, its options static."""

    @property
    def q(self) -> AnyQueries:
        """The queries [..., D]: o and lse have the other dims of q, and are sharded as they are."""


class PlanRequest(NamedTuple):
    """What `mla_jax.plan_decode` asks an implementation for, checked."""

    seq_lens: jax.Array  # [B] int32
    cache: PagedKVCache
    rows: int  # query rows per request
    rescale: str
    max_seq_len: int | None  # keys that a block table reaches
    profile: HardwareProfile | None  # None: this machine's device
    query_lens: jax.Array | None  # [B] int32, with a causal mask; None: any, or no mask
    num_heads: int


def takes_any(_: Problem) -> str | None:
    return None


def runs_anywhere(_: Target) -> str | None:
    return None


def takes_any_plan(_: Problem, __: Target) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        run: takes the op's kind of problem and returns o of q's dtype and lse in float32; for
            `paged_mla_attention` they are [B, S, H, kv_lora_rank] and [B, S, H].
        refuses: returns why it can't take a problem on any machine, or None if it can.
        lacks: returns why it can't run on a platform and device, or None if it can.
        refuses_plan: returns why the problem's plan is not for a target that it can run on, or None
            if it is. It reads static values and shapes of the problem only.
        finds_invalid: whether `run` finds invalid requests and gives them NaN itself. Other
            implementations get problems after `mark_invalid`.
        planner: makes a plan, or returns why it can't; None: the implementation takes no plan.
    """

    name: str
    run: Callable[[Any], tuple[jax.Array, jax.Array]]
    refuses: Callable[[Any], str | None] = takes_any
    lacks: Callable[[Target], str | None] = runs_anywhere
    refuses_plan: Callable[[Any, Target], str | None] = takes_any_plan
    finds_invalid: bool = False
    planner: Callable[[PlanRequest], DecodePlan | str] | None = None

    def unavailable(self, problem: Problem | None = None) -> str | None:
        """Returns why an eager call could not run the problem here; None where it could.

        Without a problem it returns why this machine could run none.
        """
        target = Target.here(problem)
        reason = self.lacks(target)
        if reason is None and problem is not None:
            reason = self.refuses(problem) or self.refuses_plan(problem, target)
        return reason

    def compute(self, problem: Any) -> tuple[jax.Array, jax.Array]:
        """Returns o and lse, with NaN for invalid requests."""
        return self.run(problem if self.finds_invalid else problem.mark_invalid())
