"""Kernels write the rows of their requests and nothing else, whatever the number of rows."""

import itertools
from typing import Any

import numpy as np
import pytest

from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.mosaic.rows import Rows

GUARD = -1.0


class ArrayRef:
    """A numpy array that is written as a Pallas reference is."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape = array, array.shape
        self.at = self

    def __getitem__(self, index: Any) -> "ArrayRef":
        parts = index if isinstance(index, tuple) else (index,)
        slices = tuple(
            part if isinstance(part, int | slice | type(Ellipsis))
            else slice(part.start, part.start + part.size)
            for part in parts
        )  # fmt: skip
        for part, size in zip(slices, self.shape, strict=False):
            if isinstance(part, slice) and part.stop is not None:
                assert 0 <= part.start < part.stop <= size, "a store past the array"
        return ArrayRef(self.array[slices])

    def __setitem__(self, index: Any, value: Any) -> None:
        target = self[index].array if index is not Ellipsis else self.array
        assert target.shape == np.shape(value)
        target[...] = value


@pytest.mark.parametrize(("height", "ctas"), [(8, 1), (16, 1), (24, 1), (32, 1), (64, 1), (64, 2)])
def test_rows_are_stored_up_to_the_last_one(height, ctas):
    """The helper alone, for every number of rows of up to three tiles, and for many."""
    g = Backend(interpreting=True)
    guards = height * ctas
    for total in (*range(1, 3 * guards + 1), 519, 520):
        o = np.full((2, total + guards, 4), GUARD)
        lse = np.full((2, total + guards), GUARD)
        expected = 10.0 + np.arange(total + guards)
        tiles = -(-total // (height * ctas))
        for tile, cta in itertools.product(range(tiles), range(ctas)):
            first = (tile * ctas + cta) * height
            rows = Rows.of_tile(1, first, height, total=total, rows_per_tile=height * ctas)
            values = 10.0 + np.arange(first, first + height)
            both = np.stack([values, -values], axis=1)
            rows.store_tile(g, ArrayRef(o), both, 0)
            rows.store_transposed(g, ArrayRef(o), both.T, 2)
            rows.store_values(g, ArrayRef(lse), values)
        np.testing.assert_array_equal(o[1, :total, 0], expected[:total])
        np.testing.assert_array_equal(o[1, :total, 1], -expected[:total])
        np.testing.assert_array_equal(o[1, :total, 2:], o[1, :total, :2])
        np.testing.assert_array_equal(lse[1, :total], expected[:total])
        for output in (o, lse):
            assert (output[0] == GUARD).all()
            assert (output[1, total:] == GUARD).all()
