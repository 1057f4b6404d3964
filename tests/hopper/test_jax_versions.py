"""The Hopper kernels run only with tested versions of JAX. Other implementations run with any."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib
import pytest

from pallas_kernels.hopper import version

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


# What makes the kernels not import, and a part of the reason that is given for it.
BREAK = {
    'jax.__version__ = "0.99.0"': "here are jax 0.99.0",
    # The kernels' first private import fails, as it does where a release has moved the name.
    "del jax._src.state.primitives.get_ref_and_transforms": (
        "cannot import name 'get_ref_and_transforms'"
    ),
}
SCRIPT = """
import json, os, sys, traceback
import jax, jax._src.state.primitives
import numpy as np
from jax import export
from jax.experimental.pallas import mosaic_gpu

def check(expected_reason):
    import mla_jax

    reason = mla_jax.available_implementations()["hopper"]
    assert expected_reason in reason, reason
    rng = np.random.default_rng(0)
    pages = rng.standard_normal((4, 64, 576)).astype("bfloat16")
    cache = mla_jax.PagedKVCache(pages, 512, 64, 64, "ND")
    q = rng.standard_normal((2, 1, 16, 576)).astype("bfloat16")
    tables, lens = np.array([[0, 1], [2, 3]], np.int32), np.array([100, 3], np.int32)

    def attend(implementation):
        return lambda q: mla_jax.paged_mla_attention(
            q, cache, tables, lens, softmax_scale=0.1, implementation=implementation
        )

    for of_none, of_xla in zip(attend(None)(q), attend("xla")(q), strict=True):
        np.testing.assert_array_equal(of_none, of_xla)
    # A program for a GPU has no kernel either.
    exported = export.export(jax.jit(attend(None)), platforms=["cuda"])(q)
    assert "mosaic_gpu" not in exported.mlir_module()
    try:
        attend("hopper")(q)
    except ValueError as error:
        assert expected_reason in str(error), error
    else:
        raise AssertionError("hopper ran")

for broken, reason in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        try:
            exec(broken)
            check(reason)
        except BaseException:
            print("with", broken, file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


def test_xla_runs_where_the_kernels_do_not_import():
    """Each in a fork of a process that has imported JAX and nothing of ours."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(BREAK)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
