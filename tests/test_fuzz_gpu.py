"""Random calls against float64 on an H200; test_fuzz runs the same on a CPU, with small sizes."""

import pytest
from fuzz.main import fuzz, number_or_random


@pytest.mark.gpu
@pytest.mark.fuzz
def test_random_calls_on_the_gpu(request: pytest.FixtureRequest, capsys) -> None:
    option = request.config.getoption
    with capsys.disabled():
        report = fuzz(
            seed=number_or_random(option("--seed")),
            calls=option("--fuzz-calls"),
            shapes=option("--fuzz-shapes"),
            replay=option("--replay"),
        )
    assert not report.failed, f"{len(report.failed)} calls failed, as printed"
    if not option("--replay"):
        assert report.counts()["calls"] == option("--fuzz-calls")
        assert report.counts()["shapes"] == option("--fuzz-shapes")
