"""On an H200: every number of query rows is stored, and nothing behind the last one."""

import pytest
import rows_sweep

WORKERS = 6  # fewer than tiles in most tasks

# Where tiles of 64 rows end, and the sizes beside them.
ENDS = tuple(rows for rows in range(33, 521) if rows % 64 in (0, 1, 8, 31, 32, 33, 63))


def tasks() -> list[tuple[str, int, int]]:
    """(cache, rows, rows per tile): all in one list, so that the processes start once."""
    # Tiles of the height that the number of rows gets: columns up to 32, then 64 and 128.
    found = [
        ("float", rows, rows + -rows % 8 if rows <= 32 else 64 if rows <= 64 else 128)
        for rows in range(1, 521)
    ]
    # Several tiles a request of each height, the last one with few rows.
    found += [
        ("float", tiles * height + rest, height)
        for height in (8, 16, 24, 32, 64)
        for tiles, rest in ((1, 1), (2, height - 1), (3, 0))
    ]
    found += [("int8", rows, rows + -rows % 8) for rows in range(1, 33)]
    return found + [("int8", rows, 64) for rows in ENDS]


@pytest.mark.gpu
@pytest.mark.sweep
def test_every_number_of_rows(capsys):
    with capsys.disabled():
        failed = rows_sweep.failures(tasks(), workers=WORKERS)
    assert failed == {}
