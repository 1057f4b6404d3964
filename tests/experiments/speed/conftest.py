"""What the tests of benchmarks replace on a machine without a GPU."""

import pytest

from experiments.speed import timing


@pytest.fixture
def small_ceilings(monkeypatch):
    """Ceilings of a device that nobody has measured."""
    rates = {"copy": 4000.0, "read": 4000.0, "matmul": 700.0, "matmul_int8": 1400.0}
    monkeypatch.setattr(timing, "ceilings", lambda **_: rates)
