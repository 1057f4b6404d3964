"""Tile sizes that fit: from profile and problem to a `TilePlan` that fits every buffer.

A `TilePlan` is plain data: the parameters of a kernel and the content of each buffer. It checks
itself when it is made. A plan that does not fit raises an error with the buffer and the excess.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mla_jax import checks
from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.work import ITEMSIZE, Problem

LATENT, ROPE, KEY = 512, 64, 576
FRACTAL = 16  # rows of the cube unit's fractal, and of an mma.sync tile
ASCEND_STAGES = 3  # buffers of keys in L1, in rotation
WGMMA_ROWS = 64


@dataclass(frozen=True)
class Tile:
    """A product m x k . k x n at one memory level; n counts keys or output columns."""

    level: str
    stage: str
    m: int
    k: int
    n: int


@dataclass(frozen=True)
class BufferUse:
    """`count` buffers of `bytes_each` bytes for `what` in the memory `buffer`."""

    buffer: str
    what: str
    bytes_each: int
    count: int = 1

    @property
    def bytes(self) -> int:
        """Bytes of all buffers."""
        return self.bytes_each * self.count


class TilePlanError(ValueError):
    """Raised for a plan that overfills a buffer; names the buffer and the excess."""


@dataclass(frozen=True)
class TilePlan:
    """The parameters of a kernel.

    block_q: query rows of a core's tile.
    block_kv: keys per block.
    kv_stages: KV blocks in flight.
    qk: "sharded" (each warpgroup has a part of the keys, and P is exchanged), "duplicated" (each
        computes all of QK) or "whole".
    num_workers: persistent cores.
    registers: per thread, by warpgroup.
    tiles: products at every memory level.
    uses: content of each buffer.
    capacity: bytes of each buffer; for registers their number.

    Raises TilePlanError if a use exceeds its capacity.
    """

    profile: str
    block_q: int
    block_kv: int
    kv_stages: int
    qk: str = "whole"
    num_workers: int = 0
    registers: tuple[int, ...] = ()
    tiles: tuple[Tile, ...] = ()
    uses: tuple[BufferUse, ...] = ()
    capacity: dict[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv", "kv_stages"):
            if getattr(self, name) < 1:
                raise TilePlanError(f"{self.profile}: {name} = {getattr(self, name)}, wanted >= 1")
        if self.qk not in ("sharded", "duplicated", "whole"):
            raise TilePlanError(
                f"{self.profile}: qk = {self.qk!r}, wanted sharded, duplicated or whole"
            )
        require_fits(self.profile, self.uses, self.registers, self.capacity)

    def used(self) -> dict[str, int]:
        """Returns the bytes used of each buffer."""
        return bytes_used(self.uses)


def bytes_used(uses: Iterable[BufferUse]) -> dict[str, int]:
    """Returns the bytes used of each buffer."""
    totals: dict[str, int] = {}
    for use in uses:
        totals[use.buffer] = totals.get(use.buffer, 0) + use.bytes
    return totals


def require_fits(
    profile: str,
    uses: Sequence[BufferUse],
    registers: tuple[int, ...],
    capacity: Mapping[str, int],
) -> None:
    """Raises TilePlanError if uses exceed a buffer, or warpgroups the registers.

    Arguments as in `TilePlan`.
    """
    for buffer, used in bytes_used(uses).items():
        if buffer not in capacity:
            raise TilePlanError(f"{profile}: {buffer} is not a buffer of this profile")
        if used > capacity[buffer]:
            parts = ", ".join(
                f"{u.what} {u.count} x {u.bytes_each}" for u in uses if u.buffer == buffer
            )
            raise TilePlanError(
                f"{profile}: {buffer} holds {capacity[buffer]} bytes, the plan needs "
                f"{used}, {used - capacity[buffer]} too many ({parts})"
            )
    threads = 128 * sum(registers)
    if registers and threads > capacity.get("registers", threads):
        raise TilePlanError(
            f"{profile}: registers holds {capacity['registers']}, warpgroups with {registers} per "
            f"thread need {threads}, {threads - capacity['registers']} too many"
        )


def require_call(profile: Any, problem: Any) -> None:
    """Raises TypeError unless these are a HardwareProfile and a Problem."""
    checks.require_type("profile", profile, HardwareProfile)
    checks.require_type("problem", problem, Problem)


def plan_tiles(
    profile: HardwareProfile,
    problem: Problem,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
    kv_stages: int | None = None,
) -> TilePlan:
    """Returns the best plan that fits, or the one asked for.

    Raises TilePlanError if none fits, and TypeError or ValueError that names the argument.
    """
    require_call(profile, problem)
    for name, size in {"block_q": block_q, "block_kv": block_kv, "kv_stages": kv_stages}.items():
        if size is not None:
            checks.require_positive(name, size)
    if profile.family == "ascend":
        if kv_stages not in (None, ASCEND_STAGES):
            raise TilePlanError(
                f"kv_stages = {kv_stages}, wanted None or {ASCEND_STAGES}, the buffers of keys in "
                f"L1 of {profile.name}"
            )
        return ascend_tiles(profile, problem, block_q=block_q, block_kv=block_kv)
    return gpu_tiles(profile, problem, block_q=block_q, block_kv=block_kv, kv_stages=kv_stages)


def gpu_tiles(
    profile: HardwareProfile,
    problem: Problem,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
    kv_stages: int | None = None,
) -> TilePlan:
    """Returns a plan with two KV stages if any block size allows them, and the largest block.

    QK is sharded over the keys of two warpgroups if each gets at least 16 keys.
    """
    block_q = block_q or WGMMA_ROWS
    errors: list[TilePlanError] = []
    for stages in (kv_stages,) if kv_stages else (2, 1):
        for keys in (block_kv,) if block_kv else (64, 32, 16):
            try:
                return _gpu_plan(profile, problem, block_q, keys, stages)
            except TilePlanError as error:
                errors.append(error)
    raise errors[0] if block_kv and kv_stages else errors[-1]


def _gpu_plan(
    profile: HardwareProfile, problem: Problem, block_q: int, keys: int, stages: int
) -> TilePlan:
    if keys % FRACTAL:
        raise TilePlanError(f"{profile.name}: block_kv = {keys}, wanted a multiple of {FRACTAL}")
    if block_q % FRACTAL:
        raise TilePlanError(f"{profile.name}: block_q = {block_q}, wanted a multiple of {FRACTAL}")
    item = ITEMSIZE[problem.kv_dtype]
    # P of a block replaces its rope keys, which QK has already read, if it fits there.
    rope_or_p = keys * max(ROPE * item, block_q * 2)
    uses = [
        BufferUse("shared", "q", block_q * KEY * 2),
        BufferUse("shared", "kv latent", keys * LATENT * item, stages),
        BufferUse("shared", "kv rope / P", rope_or_p, stages),
        BufferUse("shared", "row max and sum", 2 * block_q * 4),
    ]
    return TilePlan(
        profile=profile.name,
        block_q=block_q,
        block_kv=keys,
        kv_stages=stages,
        qk="sharded" if keys >= 2 * FRACTAL else "duplicated",
        num_workers=profile.cores,
        registers=(240, 240, 24),
        tiles=(
            Tile("shared", "QK", block_q, KEY, keys),
            Tile("shared", "PV", block_q, keys, LATENT),
            Tile("registers", "PV", block_q, keys, LATENT // 2),
        ),
        uses=tuple(uses),
        capacity={
            "shared": profile.bytes("buffer.shared"),
            "registers": profile.bytes("buffer.registers"),
        },
    )


def _largest(candidates: Iterable[int], fits_below: float) -> int:
    """Returns the largest candidate of at most `fits_below`, or 0 if there is none."""
    return max((c for c in candidates if c <= fits_below), default=0)


def _divisors(size: int) -> list[int]:
    return [d for d in range(FRACTAL, size + 1, FRACTAL) if size % d == 0]


def ascend_tiles(
    profile: HardwareProfile,
    problem: Problem,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
    widths: tuple[int, int] = (KEY, LATENT),
) -> TilePlan:
    """Returns FIA's tiling for the sizes of the buffers.

    widths: values of a key and of a value.

    L0C holds two fp32 tiles, as square as possible: 128 x 128. L1 keeps Q and has three buffers for
    keys in rotation. The widest slice of keys that leaves room is 288 of 576. L0A and L0B hold two
    slices each of what L1 provides. A block has as many keys as let a vector core hold 16 rows of
    S, P and their double buffers in UB.
    """
    key, value = widths
    item = ITEMSIZE[problem.kv_dtype]
    side = 2 ** int(math.log2(math.sqrt(profile["buffer.l0c"] / (4 * 2))))
    rows_max = side if problem.kv_dtype == "int8" else 2 * side
    if block_q is None:
        tiles = math.ceil(problem.rows / rows_max)
        block_q = math.ceil(math.ceil(problem.rows / tiles) / FRACTAL) * FRACTAL
    rows_bytes = FRACTAL * (2 * 4 + 2 * 2 + 4)  # S and P twice, the exponentials once
    powers = [2**i for i in range(4, 14)]
    if block_kv is None:
        block_kv = _largest(powers, profile["buffer.ub"] / rows_bytes) or FRACTAL
    l1 = profile["buffer.l1"]
    q_bytes = block_q * key * item
    k1 = _largest(_divisors(key), (l1 - q_bytes) / (ASCEND_STAGES * side * item)) or FRACTAL
    buffer_bytes = side * k1 * item
    v1 = _largest(_divisors(block_kv), k1)
    k0 = _largest(_divisors(k1), profile["buffer.l0a"] / (2 * side * item))
    v0 = _largest(_divisors(v1), profile["buffer.l0a"] / (2 * side * item))
    m1 = min(side, block_q)
    halves = math.ceil(block_q / side) * (key // k1)
    return TilePlan(
        profile=profile.name,
        block_q=block_q,
        block_kv=block_kv,
        kv_stages=ASCEND_STAGES,
        num_workers=profile.cores,
        tiles=(
            Tile("task", "QK", block_q, key, block_kv),
            Tile("task", "PV", block_q, block_kv, value),
            Tile("l1", "QK", m1, k1, side),
            Tile("l1", "PV", m1, v1, side),
            Tile("l0", "QK", m1, k0, side),
            Tile("l0", "PV", m1, v0, side),
        ),
        uses=(
            BufferUse("l1", "q, resident", m1 * k1 * item, halves),
            BufferUse("l1", "keys, values and P in turn", buffer_bytes, 3),
            BufferUse("l0a", "left", m1 * max(k0, v0) * item, 2),
            BufferUse("l0b", "right", side * max(k0, v0) * item, 2),
            BufferUse("l0c", "product, fp32", side * m1 * 4, 2),
            BufferUse("ub", "16 rows of S and P", rows_bytes * block_kv),
        ),
        capacity={n: profile.bytes(f"buffer.{n}") for n in ("l1", "l0a", "l0b", "l0c", "ub")},
    )
