"""The Hopper kernels run only with tested versions of JAX. Other implementations run with any."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib
import pytest

from pallas_kernels.hopper.mosaic import version

ROOT = Path(__file__).parents[2]
# What must stay inside pallas_kernels.hopper.mosaic: private modules of JAX and inline PTX.
PRIVATE = re.compile(r"jax\._src|inline_asm|inline_ptx|inline_mgpu")


def test_the_installed_version_is_tested():
    assert version.refuses(jax.__version__, jaxlib.__version__) is None


@pytest.mark.parametrize(
    ("of_jax", "of_jaxlib"),
    [("0.11.3", "0.11.3"), ("0.11.2", "0.11.3"), ("0.11.2.dev20260101", "0.11.2"), ("1.0", "1.0")],
)
def test_other_versions_are_refused(of_jax, of_jaxlib):
    """Patch releases and builds between releases count as other versions."""
    reason = version.refuses(of_jax, of_jaxlib)
    assert reason is not None
    assert f"here are jax {of_jax} and jaxlib {of_jaxlib}" in reason
    assert "0.11.2" in reason.split(";")[0]


def test_private_modules_and_ptx_stay_in_one_package():
    mosaic = ROOT / "pallas_kernels/hopper/mosaic"
    for package in ("mla_jax", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if not path.is_relative_to(mosaic):
                found = PRIVATE.search(path.read_text(encoding="utf-8"))
                assert found is None, f"{path} has {found}"


BREAK = {
    "another_version": 'jax.__version__ = "0.99.0"',
    # The kernels' first private import fails, as it does where a release has moved the name.
    "a_moved_name": """
import jax._src.state.primitives
from jax.experimental.pallas import mosaic_gpu
del jax._src.state.primitives.get_ref_and_transforms
""",
}
REASONS = {
    "another_version": "here are jax 0.99.0",
    "a_moved_name": "cannot import name 'get_ref_and_transforms'",
}
SCRIPT = """
import os
import jax
{broken}
import numpy as np
import jax.numpy as jnp
from jax import export

import mla_jax

reason = mla_jax.available_implementations()["hopper"]
assert os.environ["REASON"] in reason, reason
cache = mla_jax.PagedKVCache(
    jax.random.normal(jax.random.key(0), (4, 64, 576), jnp.bfloat16), 512, 64, 64, "ND"
)
q = jax.random.normal(jax.random.key(1), (2, 1, 16, 576), jnp.bfloat16)
tables, lens = jnp.array([[0, 1], [2, 3]]), jnp.array([100, 3])

def attend(implementation):
    run = lambda q: mla_jax.paged_mla_attention(
        q, cache, tables, lens, softmax_scale=0.1, implementation=implementation
    )
    return run

for of_none, of_xla in zip(attend(None)(q), attend("xla")(q), strict=True):
    np.testing.assert_array_equal(of_none, of_xla)
# A program for a GPU has no kernel either.
exported = export.export(jax.jit(attend(None)), platforms=["cuda"])(q)
assert "mosaic_gpu" not in exported.mlir_module()
try:
    attend("hopper")(q)
except ValueError as error:
    assert os.environ["REASON"] in str(error), error
else:
    raise AssertionError("hopper ran")
"""


@pytest.mark.parametrize("case", BREAK)
def test_xla_runs_where_the_kernels_do_not_import(case):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT.format(broken=BREAK[case])],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "REASON": REASONS[case]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
