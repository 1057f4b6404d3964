"""Random calls against float64 on an H200; test_fuzz runs the same on a CPU, with small sizes."""

import pytest
from fuzz.main import fuzz


@pytest.mark.gpu
@pytest.mark.fuzz
def test_random_calls_on_the_gpu(request: pytest.FixtureRequest, capsys) -> None:
    option = request.config.getoption
    with capsys.disabled():
        report = fuzz(
            seed=int(option("--seed")),
            calls=option("--fuzz-calls"),
            shapes=option("--fuzz-shapes"),
            replay=option("--replay"),
        )
    assert report.passed, f"{len(report.failed)} calls failed, {report.not_run} did not run"
    if not option("--replay"):
        assert report.counts()["calls"] == option("--fuzz-calls")
        assert report.counts()["shapes"] == option("--fuzz-shapes")
