"""compute-sanitizer over the Hopper kernels: addresses out of bounds, races in shared memory.

compute-sanitizer is a program of the CUDA toolkit, which JAX does not need. On some virtual
machines (gVisor) it refuses the device. Version 2025.3 often crashes with a segmentation fault
before it reports anything. With racecheck two of the kernels always cause the crash. Other crashes
are random, and rarer with Python's faulthandler. After a crash the program under test repeats
system calls without end, and the GPU is idle.

A case therefore has three attempts. If none gives a verdict, the case is skipped, but only after
the same program has passed without compute-sanitizer.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "sanitized.py"
ROOT = PROGRAM.parents[2]
CASES = (  # cache, heads, page size; one kernel per case, and the last gathers small pages
    ("float", 16, 64),
    ("float", 64, 64),
    ("float", 128, 64),
    ("int8", 16, 64),
    ("int8", 64, 64),
    ("float", 64, 1),
)
ATTEMPTS = 3
SECONDS = 120  # limit per attempt; a case takes 7 to 30


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_finds_nothing(case: tuple[str, int, int], tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer (of the CUDA toolkit)")
    program = [sys.executable, str(PROGRAM), *map(str, case)]
    options = [f"--tool={tool}", "--error-exitcode=9", "--kernel-name=kns=mla_"]
    for _ in range(ATTEMPTS):
        status, output = run([sanitizer, *options, "--show-backtrace=no", *program])
        crashed = status == -signal.SIGSEGV and "all right" not in output
        if not crashed:
            break
    refused = "Device not supported" in output
    if refused or crashed:
        _, alone = run(program)
        assert "all right" in alone, alone[-3000:]
        why = "refuses this device or virtual machine" if refused else "2025.3 itself crashes here"
        pytest.skip(f"compute-sanitizer {why}; the kernel runs and is right without it")
    assert "all right" in output, output[-3000:]
    assert status == 0, output[-3000:]


def test_leaves_nothing_running_that_a_crash_orphaned() -> None:
    crash = (
        "import os, subprocess as s; print(s.Popen(['sleep', '60']).pid, flush=True); os.abort()"
    )
    started = time.monotonic()
    status, output = run([sys.executable, "-c", crash])
    assert status == -signal.SIGABRT

    def orphan_runs() -> bool:
        try:
            stat = Path(f"/proc/{output.split()[0]}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return stat.split()[2] != "Z"

    # The signal is sent, but on a busy machine the process ends a moment later.
    while orphan_runs():
        assert time.monotonic() - started < 30
        time.sleep(0.01)
    assert time.monotonic() - started < 30


def run(command: list[str]) -> tuple[int, str]:
    """Returns exit status and output. Ends every process that it started, after SECONDS at most."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        # Each buffer is its own allocation, so that every access past its end is out of bounds.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "PYTHONFAULTHANDLER": "1",
    }
    # The output is a file, because an orphan would keep a pipe open.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            output.write(f"\nended after {SECONDS} s\n")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return process.returncode, output.read()
