"""The grid of decode benchmarks: shapes, and the presets made of them."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.framework.experiment import Row
from experiments.simulated.tables.predictions import lengths_of
from experiments.speed.best_when import AXES

HEADS = (16, 32, 64, 128)
S_Q = (1, 2, 4)
BATCHES = (1, 4, 16, 64, 128)
KV_LENS = (1024, 4096, 16384, 65536)
PAGE_SIZES = (1, 16, 64, 128)
LENGTHS = ("uniform", "varlen")
DTYPES = ("bf16", "int8")


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """One decode step of one layer; a row of the benchmark is a shape and an implementation."""

    batch: int
    dtype: str  # of the cache
    heads: int
    s_q: int
    page_size: int
    lengths: str  # "uniform", or "varlen": random around kv_len, see benchmarks/published
    kv_len: int

    @property
    def seq_lens(self) -> tuple[int, ...]:
        """KV tokens of each request, including its query tokens."""
        return lengths_of({key: str(value) for key, value in dataclasses.asdict(self).items()})

    @property
    def without_pages(self) -> "Shape":
        """The shape without its page size, to find shapes that differ only in that."""
        return dataclasses.replace(self, page_size=0)

    @property
    def label(self) -> str:
        """The shape in words, for progress and messages."""
        ragged = "~" if self.lengths == "varlen" else ""
        return (
            f"{self.heads} heads, S_q {self.s_q}, {self.batch} x {ragged}{self.kv_len}, "
            f"page {self.page_size}, {self.dtype}"
        )

    @staticmethod
    def of(row: Row) -> "Shape":
        """Returns the shape of a result's row. Raises ValueError if it has no valid shape."""
        values: dict[str, Any] = {axis: row.get(axis) for axis in AXES}
        shape = Shape(**values)
        for axis in AXES:
            value = getattr(shape, axis)
            if axis in ("dtype", "lengths"):
                wanted = DTYPES if axis == "dtype" else LENGTHS
                if not isinstance(value, str) or value not in wanted:
                    raise ValueError(f"{axis} must be one of {', '.join(wanted)}, got {value!r}")
            elif type(value) is not int or value < 1:
                raise ValueError(f"{axis} must be an integer of 1 or more, got {value!r}")
        return shape


def shapes(
    heads: Sequence[int] = (64,),
    s_q: Sequence[int] = (1,),
    batch: Sequence[int] = (128,),
    kv_len: Sequence[int] = (4096,),
    lengths: Sequence[str] = ("uniform",),
    page_size: Sequence[int] = (64,),
    dtype: Sequence[str] = ("bf16",),
) -> Iterator[Shape]:
    """Yields the product of the axes."""
    for b, d, h, s, p, kind, kv in itertools.product(
        batch, dtype, heads, s_q, page_size, lengths, kv_len
    ):
        yield Shape(b, d, h, s, p, kind, kv)


def _tiny() -> Iterator[Shape]:
    """Yields shapes for a CPU, which take seconds."""
    yield from shapes((4, 16), (1, 2), (1, 4), (64, 256), page_size=(16,))
    yield from shapes((16,), (1,), (4,), (256,), ("varlen",), (1, 64))
    yield from shapes((16,), (1,), (4,), (256,), page_size=(64,), dtype=("int8",))


def _quick() -> Iterator[Shape]:
    """Yields shapes that take a minute on a GPU."""
    yield from shapes((16, 128), (1,), (1,), (1024, 16384))
    yield from shapes((16, 64, 128), (1,), (128,), (4096,))
    yield from shapes((64,), (1,), (128,), (4096,), ("varlen",))


def _standard() -> Iterator[Shape]:
    """Yields shapes along every axis, around those of servers, and all that have a target."""
    usual = (16, 64, 128)
    yield from shapes(usual, (1,), (1, 16, 64, 128), (1024, 4096, 16384))
    yield from shapes(usual, (1,), (1, 16), (65536,))
    yield from shapes(usual, (1,), (16, 64, 128), (4096,), ("varlen",))
    yield from shapes((32,), (1,), (64, 128), (1024, 4096, 16384))
    yield from shapes(usual, (2,), (64, 128), (1024, 4096, 16384))
    yield from shapes(usual, (2,), (64, 128), (4096,), ("varlen",))
    yield from shapes((16, 128), (4,), (64,), (4096,))
    yield from shapes(usual, (1,), (4,), (4096, 16384))
    yield from shapes(usual, (1,), (128,), (4096,), page_size=(1, 16, 128))
    yield from shapes(usual, (1,), (64, 128), (1024, 4096, 16384), dtype=("int8",))
    yield from shapes(usual, (1,), (128,), (4096,), ("varlen",), dtype=("int8",))
    yield from shapes((16, 128), (1,), (1,), (16384,), dtype=("int8",))
    yield from shapes((128,), (2,), (64,), (4096,), dtype=("int8",))


def _full() -> Iterator[Shape]:
    """Yields the whole grid, which takes hours."""
    yield from shapes(HEADS, S_Q, BATCHES, KV_LENS, LENGTHS, PAGE_SIZES, DTYPES)


def _bars() -> Iterator[Shape]:
    """Yields the shapes for which the Hopper kernels have a target."""
    yield from shapes((128,), (1, 2), (64, 128), (4096, 16384))
    yield from shapes((64,), (1,), (128,), (4096,))
    yield from shapes((16,), (1,), (128,), (16384,))
    yield from shapes((16, 64), (1,), (64,), (1024,))
    yield from shapes((16,), (1,), (16,), (1024, 4096))
    yield from shapes((16, 128), (1,), (1,), (1024, 16384))
    yield from shapes((16, 64, 128), (1,), (128,), (4096,), ("varlen",))
    yield from shapes((64,), (1,), (128,), (4096,), page_size=(1, 16, 128))


PRESETS = {
    "tiny": _tiny,
    "quick": _quick,
    "standard": _standard,
    "full": _full,
    "bars": _bars,
}


def preset(name: str) -> list[Shape]:
    """Returns the shapes of a preset, sorted so that those that share arrays are adjacent."""
    return sorted(set(PRESETS[name]()))
