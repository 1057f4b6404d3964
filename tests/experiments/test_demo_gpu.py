"""`make demo` for real, on a machine with a GPU, in the interpreter that runs the tests."""

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 90
PHASES = ("prefill", "decode", "MTP")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@pytest.mark.gpu
@pytest.mark.demo
def test_make_demo_on_the_gpu(tmp_path: pathlib.Path) -> None:
    # The demo starts as a user starts it, without what conftest sets for tests.
    environment = {name: value for name, value in os.environ.items() if "XLA" not in name}
    command = ["make", "demo", f"PYTHON={sys.executable}", f"OUTPUT={tmp_path}"]
    started = time.monotonic()
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=5 * SECONDS
    )
    took = time.monotonic() - started
    print(ended.stdout[-6000:], ended.stderr[-3000:], f"{took:.0f} s")
    assert ended.returncode == 0
    assert took < SECONDS
    (path,) = tmp_path.rglob("result.json")
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if "cache" in row and f"{PHASES[0]}_error" in row]
    found = {(row["implementation"], row["cache"]): row for row in rows}
    for (name, _), row in found.items():
        for phase in PHASES:
            error, ms = row[f"{phase}_error"], row[f"{phase}_ms"]
            assert is_number(error) == is_number(ms), (name, phase, error, ms)
            assert is_number(error) or row["note"], (name, phase)
    # On a Hopper GPU the kernels serve both caches.
    for cache in ("bfloat16", "int8"):
        assert is_number(found["hopper", cache]["decode_error"])
        assert found["hopper", cache]["passed"]
    assert list(path.parent.glob("*.png"))
