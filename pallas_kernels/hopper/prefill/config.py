"""The config of the prefill kernel: its widths, its schedule and the shared memory of a CTA."""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

from mla_jax.hal import TilePlanError, load_profile
from mla_jax.hal.tiling import WGMMA_ROWS, BufferUse, bytes_used, require_fits
from pallas_kernels.hopper.config import ALIGNMENT, BARRIER_BYTES, ITEMSIZE, SmLimits

PANEL = 64  # columns of a panel: 128 bytes, a line of a swizzled tile
COMPUTING = 2  # warpgroups that compute
TILE_ROWS = COMPUTING * WGMMA_ROWS  # query rows of a work item
CHECKERS = 2  # warps that look for NaN and infinity in V
ITEM_STAGES = 2  # work items whose descriptors are in shared memory
L2_BYTES = 32 << 20  # what the keys and values of heads in work at the same time may take
NOPE_DIMS, ROPE_DIMS, V_DIMS = (128, 192), (0, 64), (128, 256)
BLOCK_KEYS = (
    128,
    64,
)  # keys per KV block; divisors of TILE_ROWS, so that tiles end where blocks do


class Schedule(NamedTuple):
    """The fields of a `PrefillConfig` that depend on the widths."""

    block_keys: int
    stages: int
    registers: tuple[int, int]


# `PrefillConfig.of_widths` takes the first one that fits.
SCHEDULES = (
    Schedule(128, 2, (232, 40)),
    Schedule(64, 4, (240, 24)),
    Schedule(64, 3, (240, 24)),
    Schedule(64, 2, (240, 24)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """Static options of the kernel, checked when they are made.

    Attributes:
        limits: of the SM that runs a CTA; None: those of an H200.
        nope_dim: columns of q and k without rotary embedding, per head.
        rope_dim: columns of q and k with rotary embedding; those of k are shared by all heads.
        v_dim: columns of v and o.
        block_keys: keys per KV block. A tile masks its last block of 128, or its last two of 64.
        stages: KV blocks of K, and of V, in shared memory.
        registers: per thread of a computing warpgroup and of the loader, as setmaxnreg takes.
        in_turns: whether the computing warpgroups issue their products in turns.
        trims: whether a warpgroup whose rows see none of the last 64 keys of a tile's last block
            leaves these keys out.
        heads_at_once: heads whose tiles are in work at the same time; None: as many as
            `work_items.heads_in_work` says, by the sizes of keys and values.

    Raises:
        TilePlanError: an option that the kernel can't have, or more shared memory or registers than
            an SM has. The message names the profile and the field or the excess.
    """

    limits: SmLimits | None = None
    nope_dim: int = 128
    rope_dim: int = 64
    v_dim: int = 128
    block_keys: int = 128
    stages: int = 2
    registers: tuple[int, int] = (232, 40)
    in_turns: bool = True
    trims: bool = True
    heads_at_once: int | None = None

    @staticmethod
    def of_widths(nope_dim: int, rope_dim: int, v_dim: int) -> "PrefillConfig":
        """Returns the default config for these widths; raises TilePlanError if they have none."""
        make = functools.partial(PrefillConfig, nope_dim=nope_dim, rope_dim=rope_dim, v_dim=v_dim)
        for schedule in SCHEDULES[:-1]:
            with contextlib.suppress(TilePlanError):
                return make(**schedule._asdict())
        return make(**SCHEDULES[-1]._asdict())

    def __post_init__(self) -> None:
        if self.limits is None:
            object.__setattr__(self, "limits", SmLimits.of(load_profile("H200_SXM")))
        for name, widths in (("nope_dim", NOPE_DIMS), ("rope_dim", ROPE_DIMS), ("v_dim", V_DIMS)):
            got = getattr(self, name)
            self._require(name, got in widths, " or ".join(map(str, widths)))
        wanted = " or ".join(map(str, BLOCK_KEYS))
        self._require("block_keys", self.block_keys in BLOCK_KEYS, wanted)
        self._require("stages", self.stages in (2, 3, 4), "2, 3 or 4")
        fits = len(self.registers) == 2 and all(
            r % 8 == 0 and 24 <= r <= 256 for r in self.registers
        )
        self._require("registers", fits, "2 multiples of 8 in 24 .. 256 (setmaxnreg)")
        # A CTA starts with so many per thread, and setmaxnreg waits forever for more than these.
        warpgroups = len(self.warpgroup_registers)
        assert self.limits is not None
        most = warpgroups * (self.limits.registers // (128 * warpgroups) // 8 * 8)
        fits = sum(self.warpgroup_registers) <= most
        self._require("registers", fits, f"at most {most} in {warpgroups} warpgroups")
        least = 1 if self.heads_at_once is None else self.heads_at_once
        self._require("heads_at_once", least >= 1, "an integer >= 1")
        # float32 O and S, and P in 16 bits; the rest of a thread is sums, addresses and indices.
        needed = WGMMA_ROWS * (self.v_dim + self.block_keys + self.block_keys // 2) // 128 + 40
        self._require("registers", self.registers[0] >= needed, f">= {needed} to keep O, S and P")
        capacity = {"shared": self.limits.shared_memory, "registers": self.limits.registers}
        require_fits(self.limits.profile, self.shared_memory, self.warpgroup_registers, capacity)

    @property
    def k_panels(self) -> int:
        """Panels of q and of k: those without rotary embedding, then those with it."""
        return (self.nope_dim + self.rope_dim) // PANEL

    @property
    def nope_panels(self) -> int:
        return self.nope_dim // PANEL

    @property
    def v_panels(self) -> int:
        return self.v_dim // PANEL

    @property
    def warpgroup_registers(self) -> tuple[int, ...]:
        computing, loader = self.registers
        return *(computing for _ in range(COMPUTING)), loader

    @property
    def shared_memory(self) -> tuple[BufferUse, ...]:
        """What a CTA keeps in shared memory, in bytes."""
        q_panel, kv_panel = WGMMA_ROWS * PANEL * ITEMSIZE, self.block_keys * PANEL * ITEMSIZE
        # q full and empty, turns; per stage K full and empty, V full, empty, first and checked; per
        # item stage ready and done
        barriers = 3 * COMPUTING + 6 * self.stages + 2 * ITEM_STAGES
        return (
            BufferUse("shared", "q", self.k_panels * q_panel, COMPUTING),
            BufferUse("shared", "k", self.k_panels * kv_panel, self.stages),
            BufferUse("shared", "v", self.v_panels * kv_panel, self.stages),
            BufferUse("shared", "work items", ALIGNMENT),
            BufferUse("shared", "first rows changed in V", ALIGNMENT),
            BufferUse("shared", "barriers", BARRIER_BYTES, barriers),
        )

    @property
    def shared_memory_bytes(self) -> int:
        return bytes_used(self.shared_memory)["shared"]

    def _require(self, name: str, holds: bool, wanted: Any) -> None:
        if not holds:
            assert self.limits is not None
            got = getattr(self, name)
            raise TilePlanError(f"{self.limits.profile}: {name} = {got!r}, wanted {wanted}")
