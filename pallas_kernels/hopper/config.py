"""The configs of the Hopper kernels: one class per kernel, with its options and what it needs.

A config is checked when it is made: its options against what the instructions take, its shared
memory and registers against those of an SM. The bytes are those that the compiler allocates.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

from mla_jax.hal import HardwareProfile, TilePlanError
from mla_jax.hal.tiling import WGMMA_ROWS, BufferUse, bytes_used, require_fits
from pallas_kernels.hopper.work_items import BLOCK

ROW_GROUP = 8  # rows of a swizzled tile in shared memory, and the step of wgmma's n
MOST_COLUMNS = 32  # rows of the transposed kernels: each takes 4 registers per thread for O^T
MOST_COLUMNS_OF_TWO = 16  # where two warpgroups hold an O^T each, and one sends half of it
ALIGNMENT = 1024  # bytes that Mosaic GPU rounds every array in shared memory up to
BARRIER_BYTES = 8
ITEMSIZE = 2  # bfloat16 or float16
FLOAT32 = 4
ALL_REGISTERS = 255  # per thread, of a warpgroup that sets no number


@dataclasses.dataclass(frozen=True)
class SmLimits:
    """What one SM has, by the hardware profile of that name."""

    profile: str
    shared_memory: int  # bytes per CTA
    registers: int

    @staticmethod
    def of(profile: HardwareProfile) -> "SmLimits":
        """Reads a profile; raises TilePlanError if it is not of an NVIDIA GPU."""
        if profile.family != "nvidia":
            raise TilePlanError(f"{profile.name}: family = {profile.family!r}, wanted 'nvidia'")
        memory, registers = profile.bytes("buffer.shared"), profile.bytes("buffer.registers")
        return SmLimits(profile.name, memory, registers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig(ABC):
    """What the configs of all decode kernels have: static, hashable, equal if all values are.

    Attributes:
        limits: of the SM that runs a CTA.
        rows_per_tile: query rows per work item.
        split_overhead: blocks that a work item costs besides its own, for the planner.
        merge_overhead: blocks that it costs to split any tile at all, for the planner.

    Raises:
        TilePlanError: an option that the kernel can't have, or more shared memory or registers than
            an SM has. The message names the profile and the field or the excess.
    """

    limits: SmLimits
    rows_per_tile: int
    kv_lora_rank: int = 512
    rope_dim: int = 64
    split_overhead: int
    merge_overhead: int = 0

    def __post_init__(self) -> None:
        for name in ("rows_per_tile", "kv_lora_rank", "rope_dim"):
            self._require(name, _is_count(getattr(self, name), 1), "an integer >= 1")
        for name in ("split_overhead", "merge_overhead"):
            self._require(name, _is_count(getattr(self, name), 0), "an integer >= 0")
        self._check()
        capacity = {"shared": self.limits.shared_memory, "registers": self.limits.registers}
        require_fits(self.profile, self.shared_memory, self.warpgroup_registers, capacity)

    @abstractmethod
    def _check(self) -> None:
        """Raises TilePlanError for an option that the kernel can't have."""

    @property
    @abstractmethod
    def shared_memory(self) -> tuple[BufferUse, ...]:
        """What a CTA keeps in shared memory, in bytes."""

    @property
    @abstractmethod
    def warpgroup_registers(self) -> tuple[int, ...]:
        """Registers per thread, of each warpgroup of a CTA."""

    @property
    def shared_memory_bytes(self) -> int:
        return bytes_used(self.shared_memory)["shared"]

    @property
    def profile(self) -> str:
        """Name of the hardware profile that the config is checked against."""
        return self.limits.profile

    @property
    def ctas_per_tile(self) -> int:
        """CTAs that share a tile and its KV blocks, each with rows of its own."""
        return 1

    @property
    def in_pairs(self) -> bool:
        """Whether workers 2i and 2i + 1 are the CTAs of a cluster.

        They combine a tile that only these two share in their shared memories.
        """
        return False

    @property
    def q_row_multiple(self) -> int:
        """The kernel takes q with a multiple of so many rows."""
        return self.rows_per_tile

    def num_workers(self, num_sms: int) -> int:
        """Returns the workers of a plan for so many SMs, an even number if they are in pairs.

        A worker is the CTA, or the cluster of CTAs, that computes a tile.
        """
        workers = num_sms // self.ctas_per_tile
        return workers - workers % 2 if self.in_pairs else workers

    def num_ctas(self, num_workers: int) -> int:
        """Returns the CTAs of a launch for a plan of so many workers."""
        if self.in_pairs:
            num_workers += num_workers % 2
        return num_workers * self.ctas_per_tile

    def _require(self, name: str, holds: bool, wanted: Any) -> None:
        if not holds:
            got = getattr(self, name)
            raise TilePlanError(f"{self.profile}: {name} = {got!r}, wanted {wanted}")

    def _require_widths(self) -> None:
        fits = self.kv_lora_rank % 128 == 0 and self.kv_lora_rank <= 512
        self._require("kv_lora_rank", fits, "a multiple of 128 up to 512")
        self._require("rope_dim", self.rope_dim % 64 == 0, "a multiple of 64")

    def _require_int8_widths(self) -> None:
        """A warp dequantizes one swizzled tile of 128 columns. Other rope widths were not tried."""
        self._require("kv_lora_rank", self.kv_lora_rank == 512, 512)
        self._require("rope_dim", self.rope_dim == BLOCK, BLOCK)

    def _require_columns(self, most: int) -> None:
        """Rows are columns of a transposed tile."""
        fits = self.rows_per_tile % ROW_GROUP == 0 and self.rows_per_tile <= most
        self._require("rows_per_tile", fits, f"a multiple of {ROW_GROUP} up to {most}")

    def _require_setmaxnreg(self, name: str, number: int) -> None:
        values = getattr(self, name)
        fits = _are_counts(values, number, 24) and all(r % 8 == 0 and r <= 256 for r in values)
        self._require(name, fits, f"{number} multiples of 8 in 24 .. 256 (setmaxnreg)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig(KernelConfig):
    """Config of `decode`: 64 rows per CTA, in a tile of its own or in one of 128 per cluster.

    Two warpgroups compute, each with half of the latent columns, and one loads.

    Attributes:
        registers: per thread of a computing warpgroup and of the loader, as setmaxnreg takes.
    """

    registers: tuple[int, int] = (240, 24)
    split_overhead: int = 5

    def _check(self) -> None:
        self._require_widths()
        fits = self.rows_per_tile in (WGMMA_ROWS, 2 * WGMMA_ROWS)
        self._require("rows_per_tile", fits, "64, or 128 (a cluster of two)")
        self._require_setmaxnreg("registers", 2)
        # float32: its half of O, and S of a block; the rest of a thread is scales, addresses, P.
        needed = WGMMA_ROWS * (self.kv_lora_rank // 2 + BLOCK) // 128 + 32
        self._require("registers", self.registers[0] >= needed, f">= {needed} to keep O and S")

    @property
    def ctas_per_tile(self) -> int:
        return self.rows_per_tile // WGMMA_ROWS

    @property
    def in_pairs(self) -> bool:
        return self.ctas_per_tile == 1

    @property
    def q_row_multiple(self) -> int:
        return ROW_GROUP

    @property
    def warpgroup_registers(self) -> tuple[int, ...]:
        computing, loader = self.registers
        return computing, computing, loader

    @property
    def shared_memory(self) -> tuple[BufferUse, ...]:
        rows, half, rope = WGMMA_ROWS, self.kv_lora_rank // 2, self.rope_dim
        stages, pair = 2, 2 * self.in_pairs
        # q full and empty, sums ready; per stage, in two sets: three parts full, P ready; per stage
        # both halves empty; in a pair: maxima and sums sent, O sent
        barriers = 3 + stages * (2 * (3 + 1) + 2) + pair
        return (
            _shared("q left", rows * half * ITEMSIZE),
            _shared("q right", rows * half * ITEMSIZE),
            _shared("q rope", rows * rope * ITEMSIZE),
            _shared("kv left", BLOCK * half * ITEMSIZE, stages),
            _shared("kv right", BLOCK * half * ITEMSIZE, stages),
            _shared("kv rope / P", BLOCK * max(rope, BLOCK) * ITEMSIZE, stages),
            _shared("row max", ALIGNMENT),
            _shared("row sum", ALIGNMENT),
            _shared("work items", ALIGNMENT),
            _shared("row max and sum of the other CTA", ALIGNMENT, pair),
            _shared("barriers", BARRIER_BYTES, barriers),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTransposedConfig(KernelConfig):
    """Config of `decode_transposed`: up to 32 rows; one warpgroup computes and one loads.

    Attributes:
        in_pairs: as in `KernelConfig`.
        kv_stages: of the left half of the latent, of its right half and of the rope columns.
        q_stages: work items whose q is in shared memory.
    """

    in_pairs: bool = False
    kv_stages: tuple[int, int, int] = (2, 2, 2)
    q_stages: int = 2
    split_overhead: int = 2

    def _check(self) -> None:
        self._require_widths()
        self._require_columns(MOST_COLUMNS)
        rows, rank = self.rows_per_tile, self.kv_lora_rank
        can = (False, True) if can_be_in_pairs(rows, rank) else (False,)
        wanted = f"{' or '.join(map(str, can))} for {rows} rows and kv_lora_rank {rank}"
        self._require("in_pairs", isinstance(self.in_pairs, bool) and self.in_pairs in can, wanted)
        self._require("kv_stages", _are_counts(self.kv_stages, 3, 1), "3 integers >= 1")
        self._require("q_stages", _is_count(self.q_stages, 1), "an integer >= 1")

    @property
    def warpgroup_registers(self) -> tuple[int, ...]:
        return ALL_REGISTERS, ALL_REGISTERS

    @property
    def shared_memory(self) -> tuple[BufferUse, ...]:
        rows, half, rope = self.rows_per_tile, self.kv_lora_rank // 2, self.rope_dim
        left_stages, right_stages, rope_stages = self.kv_stages
        # full and empty of every stage; in a pair: maxima and sums sent, O^T sent
        barriers = 2 * (self.q_stages + sum(self.kv_stages)) + 2 * self.in_pairs
        return (
            _shared("q", rows * (self.kv_lora_rank + rope) * ITEMSIZE, self.q_stages),
            _shared("kv left", BLOCK * half * ITEMSIZE, left_stages),
            _shared("kv right", BLOCK * half * ITEMSIZE, right_stages),
            _shared("kv rope", BLOCK * rope * ITEMSIZE, rope_stages),
            _shared("P", rows * BLOCK * ITEMSIZE),
            _shared("row max", ALIGNMENT),
            _shared("row sum", ALIGNMENT),
            _shared("invalid items", ALIGNMENT),
            _shared("row max and sum of the other CTA", ALIGNMENT, int(self.in_pairs)),
            _shared("barriers", BARRIER_BYTES, barriers),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeInt8Config(KernelConfig):
    """Config of `decode_int8`: 64 rows per CTA; two warpgroups make O, one makes P, one loads.

    Each that makes O has half of the latent columns, as rows of O^T.

    Attributes:
        kv_stages: KV blocks in shared memory.
        registers: per thread of a warpgroup that makes O, of that which makes P and of the loader,
            as setmaxnreg takes.
    """

    kv_stages: int = 3
    registers: tuple[int, int, int] = (176, 136, 24)
    split_overhead: int = 5

    def _check(self) -> None:
        self._require_int8_widths()
        self._require("rows_per_tile", self.rows_per_tile == WGMMA_ROWS, WGMMA_ROWS)
        # S of the next block is computed before P of this one is multiplied.
        self._require("kv_stages", _is_count(self.kv_stages, 2), "an integer >= 2")
        self._require_setmaxnreg("registers", 3)
        # float32 half of O^T, V^T of half a group twice and addresses; S as two of int32 and one
        # of float32.
        rows, half = WGMMA_ROWS, self.kv_lora_rank // 2
        output, scores = rows * half // 128 + 48, 3 * rows * BLOCK // 128 + 40
        fits = self.registers[0] >= output and self.registers[1] >= scores
        self._require("registers", fits, f">= {output} to keep O^T, >= {scores} to keep S")

    @property
    def warpgroup_registers(self) -> tuple[int, ...]:
        output, softmax, loader = self.registers
        return output, output, softmax, loader

    @property
    def shared_memory(self) -> tuple[BufferUse, ...]:
        rows, stages = WGMMA_ROWS, self.kv_stages
        # work item ready and done, q ready, sums ready and taken; per stage full, empty, P ready
        barriers = 5 + 3 * stages
        return (
            _shared("q latent", rows * self.kv_lora_rank, 2),
            _shared("q rope", rows * self.rope_dim * ITEMSIZE),
            _shared("q steps", ALIGNMENT),
            _shared("keys of queries", ALIGNMENT),
            _shared("kv latent", BLOCK * self.kv_lora_rank, stages),
            _shared("kv rope", BLOCK * self.rope_dim * ITEMSIZE, stages),
            _shared("P", rows * BLOCK * ITEMSIZE, stages),
            _shared("token scales", _aligned(stages * BLOCK * FLOAT32)),
            _shared("row max", ALIGNMENT),
            _shared("row max of each warp", ALIGNMENT),
            _shared("rescaling factors", _aligned(stages * rows * FLOAT32)),
            _shared("whether to rescale", ALIGNMENT),
            _shared("1 / row sum", ALIGNMENT),
            _shared("where O belongs", ALIGNMENT),
            _shared("work items", ALIGNMENT),
            _shared("barriers", BARRIER_BYTES, barriers),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTransposedInt8Config(KernelConfig):
    """Config of `decode_transposed_int8`: up to 32 rows, or 16 if two warpgroups compute.

    Attributes:
        computing: warpgroups that compute, 1 or 2; one more loads.
        kv_stages: KV blocks in shared memory, a multiple of `computing`.
        registers: as in `DecodeConfig`, where two compute. Where one does, each takes all.
    """

    computing: int = 2
    kv_stages: int = 4
    registers: tuple[int, int] = (232, 40)
    split_overhead: int = 2

    def _check(self) -> None:
        self._require_int8_widths()
        fits = _is_count(self.computing, 1) and self.computing <= 2
        self._require("computing", fits, "1 or 2 warpgroups")
        self._require_columns(MOST_COLUMNS if self.computing == 1 else MOST_COLUMNS_OF_TWO)
        fits = _is_count(self.kv_stages, 1) and self.kv_stages % self.computing == 0
        self._require("kv_stages", fits, f"a multiple of computing = {self.computing}")
        self._require_setmaxnreg("registers", 2)

    @property
    def warpgroup_registers(self) -> tuple[int, ...]:
        if self.computing == 1:
            return ALL_REGISTERS, ALL_REGISTERS
        computing, loader = self.registers
        return computing, computing, loader

    @property
    def shared_memory(self) -> tuple[BufferUse, ...]:
        rows, half, stages = self.rows_per_tile, self.kv_lora_rank // 2, self.kv_stages
        partial_bytes = FLOAT32 * half * (rows if self.computing == 2 else 1)
        # full and empty of the stages; two work items known and done; q ready; partial O sent, read
        barriers = 2 * stages + 7
        return (
            _shared("q latent", rows * self.kv_lora_rank, 2),
            _shared("q rope", rows * self.rope_dim * ITEMSIZE),
            _shared("q steps", ALIGNMENT),
            _shared("kv latent", BLOCK * self.kv_lora_rank, stages),
            _shared("kv rope", BLOCK * self.rope_dim * ITEMSIZE, stages),
            _shared("token scales", _aligned(stages * BLOCK * FLOAT32)),
            _shared("P", rows * BLOCK * ITEMSIZE, self.computing),
            _shared("row max", ALIGNMENT),
            _shared("row sum", ALIGNMENT),
            _shared("partial O", partial_bytes, self.computing),
            _shared("its row max and sum", ALIGNMENT),
            _shared("invalid items", ALIGNMENT),
            _shared("barriers", BARRIER_BYTES, barriers),
        )


def can_be_in_pairs(rows_per_tile: int, kv_lora_rank: int) -> bool:
    """Whether half of a transposed tile is two parts of whole registers of a warpgroup.

    The other CTA of the cluster receives it in this form.
    """
    return rows_per_tile * kv_lora_rank // 2 % 1024 == 0


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_counts(values: Any, number: int, least: int) -> bool:
    fits = isinstance(values, tuple) and len(values) == number  # a list has no hash
    return fits and all(_is_count(value, least) for value in values)


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT


def _shared(what: str, bytes_each: int, count: int = 1) -> BufferUse:
    return BufferUse("shared", what, bytes_each, count)
