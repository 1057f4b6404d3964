"""Settings that all tests share."""

import gc
import os
import secrets

import hypothesis
import pytest

# Mosaic GPU's interpreter runs every warpgroup of a kernel as a task of XLA's CPU thread pool and
# waits for all of them: with fewer threads than warpgroups (a machine of 2 cores) it would never
# end. The pool has a thread for each device or core; JAX reads this as it starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

# The gpu tests run in several processes on one GPU; by default the first takes its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Tracing and lowering make millions of small objects that live on: 4 % of all time went into
# looking at them again.
gc.set_threshold(200_000, 20, 20)

hypothesis.settings.register_profile(
    "here", deadline=None, max_examples=25, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    fuzz = parser.getgroup("fuzz", "random calls of the attention op (tests/support/fuzz)")
    fuzz.addoption("--seed", default="117", help="a number, or random; it is printed")
    fuzz.addoption("--fuzz-calls", type=int, default=2000, help="on a GPU")
    fuzz.addoption("--fuzz-shapes", type=int, default=160, help="on a GPU")
    fuzz.addoption("--replay", default="", help="on a GPU: one call, by the name that it failed by")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed == "random":  # (one for all processes of xdist, which get the options)
        config.option.seed = str(secrets.randbelow(10**9))


def pytest_report_header(config: pytest.Config) -> str:
    return f"fuzz: --seed={config.option.seed}"


@pytest.fixture
def races(monkeypatch):
    """Of all launches of Mosaic GPU's interpreter: see races.py."""
    from interpreter import Races  # (after XLA_FLAGS)

    return Races(monkeypatch)


@pytest.fixture
def h200(monkeypatch):
    """Kernels are made for an H200 that is there, although this machine may have no GPU."""
    from pallas_kernels.hopper import device  # (after XLA_FLAGS)

    monkeypatch.setattr(device, "resident_ctas", lambda: 132)


@pytest.fixture(scope="session", autouse=True)
def _cheap_callbacks_and_lowering():
    from aot import version_of_ptxas_asked_once  # (after XLA_FLAGS)
    from interpreter import use_cheap_callbacks

    with pytest.MonkeyPatch.context() as monkeypatch, version_of_ptxas_asked_once():
        use_cheap_callbacks(monkeypatch)
        yield
