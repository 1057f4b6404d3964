"""Runs an experiment: python -m experiments.launch --experiment=NAME --output_dir=DIR

It writes DIR/NAME/result.json and pictures next to it. The exit status is 0 if the experiment
passed and 1 if it ran and did not pass. It is 2 if the experiment could not run, because of flags,
input or a full disk. After Ctrl-C it is 130, after SIGTERM 143.
"""

import dataclasses
import datetime
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

from absl import flags

from experiments.framework.console import say
from experiments.framework.experiment import Experiment, InputError, Made, Outcome, Output
from experiments.framework.options import define_flags, read_options

# Experiments by the folder of their module. To add one, write its module (see
# framework/experiment.py) and list it here.
FOLDERS = {
    "serving": ("demo", "soak"),
    "accuracy": ("correctness", "parity", "amla_accuracy", "int8_accuracy"),
    "accounting": ("cache_size", "split_kv"),
    "simulated": ("published", "pipeline", "compare", "sweep", "best", "portrait"),
    "speed": ("benchmark", "kernel_bench", "prefill", "sharded"),
    "speed.layer": ("layer_step",),
    "speed.calibrate": ("calibrate",),
    "generate": ("generate",),
    "speed.tiles": ("choices",),
    "report": ("report",),
}
FOLDER_OF = {name: folder for folder, names in FOLDERS.items() for name in names}
EXPERIMENTS = tuple(FOLDER_OF)


class Interrupted(KeyboardInterrupt):
    """Raised when a launch is stopped from outside; the message says what it leaves."""


def load(name: str) -> Experiment:
    """Imports the module of an experiment."""
    return cast(Experiment, importlib.import_module(f"experiments.{FOLDER_OF[name]}.{name}"))


def command() -> NoReturn:
    """Runs `main` as this process; a signal that ends it prints a line instead of a traceback."""
    stopped_by = signal.SIGINT

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal stopped_by
        stopped_by = signal.SIGTERM
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        status = main(sys.argv)
    except KeyboardInterrupt as stopped:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        say(f"interrupted: {stopped or 'before the experiment began'}", style="red", stderr=True)
        status = 128 + stopped_by
    if status < 128:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without waiting for threads that compile, which may take minutes


def main(argv: list[str]) -> int:
    """Runs the command line `argv`, program name first; returns the exit status.

    Raises KeyboardInterrupt if it is interrupted. The message says how to continue.
    """
    running = "the launcher"
    try:
        chosen = _launcher_flags()
        chosen(argv, known_only=True)
        if chosen.list:
            for name in EXPERIMENTS:
                say(f"{name:<16}{load(name).SUMMARY}")
            return 0
        if chosen.help:
            say(_help(chosen.experiment))
            return 0
        if chosen.experiment is None:
            raise InputError(f"--experiment must be given, one of {', '.join(EXPERIMENTS)}")
        if not chosen.output_dir.strip():
            raise InputError("--output_dir must name a folder, got an empty name")
        running = chosen.experiment
        options = _parse(load(chosen.experiment), argv)
        return _run(chosen.experiment, options, Path(chosen.output_dir))
    except (flags.Error, InputError) as error:
        return _refuse(str(error))
    except BrokenPipeError as error:
        return _refuse(f"{running} stopped: {error}")
    except OSError as error:
        return _refuse(f"{running} stopped while writing to {chosen.output_dir}: {error}")
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        return _refuse(f"{running} stopped: {what} (traceback: {_keep_traceback()})")


def _refuse(message: str) -> int:
    """Prints in one line why the launch could not run; returns its exit status."""
    say(f"error: {' '.join(message.split())}", style="red", stderr=True)
    return 2


def _keep_traceback() -> str:
    """Writes the traceback of the current error to a temporary file; returns its path."""
    try:
        handle, path = tempfile.mkstemp(".txt", "mla_jax_traceback_")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exc(file=file)
    except OSError as error:
        return f"none, {error}"
    return path


def _run(name: str, options: Any, output_dir: Path) -> int:
    with Output.opened(output_dir / name) as output:
        started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
        try:
            outcome = load(name).run(options, output)
            return _finish(name, options, output, outcome, started, time.monotonic() - clock)
        except KeyboardInterrupt as error:
            raise Interrupted(_what_is_left(output)) from error


def _finish(
    name: str,
    options: Any,
    output: Output,
    outcome: Outcome,
    started: datetime.datetime,
    duration_s: float,
) -> int:
    """Writes result.json and prints the verdict; returns the exit status."""
    from experiments.framework.results import SCHEMA_VERSION, environment, write_result

    made = outcome.made or Made(started.isoformat(timespec="seconds"), duration_s, environment())
    result = {
        "schema_version": SCHEMA_VERSION,
        "experiment": name,
        "passed": outcome.passed,
        "summary": outcome.summary,
        **outcome.headline,
        "started": made.started,
        "duration_s": round(made.duration_s, 3),
        "options": dataclasses.asdict(options),
        "environment": made.environment,
        "rows": outcome.rows,
        "files": output.files,
    }
    path = output.folder / "result.json"
    write_result(path, result)
    say(outcome.summary)
    say(
        f"{'passed' if outcome.passed else 'FAILED'} in {result['duration_s']:.1f} s: {path}",
        style="green" if outcome.passed else "red",
    )
    return 0 if outcome.passed else 1


def _what_is_left(output: Output) -> str:
    """Returns what an interrupted launch leaves and how to continue."""
    if output.rows_file is not None and output.rows_file.exists():
        return (
            f"the rows so far are in {output.rows_file}; the same command continues from there, "
            "and with --collect it makes a result of them"
        )
    return f"no result was written to {output.folder}; the same command starts again"


def _launcher_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # accepts flags after a word that is not a flag
    where: dict[str, Any] = {"flag_values": values, "module_name": "launcher"}
    flags.DEFINE_enum("experiment", None, EXPERIMENTS, "experiment to run", **where)
    flags.DEFINE_string("output_dir", "out", "folder for the folders of results", **where)
    flags.DEFINE_bool("list", False, "list the experiments, with a line for each", **where)
    flags.DEFINE_bool("help", False, "show the flags, also those of --experiment", **where)
    return values


def _parse(experiment: Experiment, argv: list[str]) -> Any:
    """Parses the experiment's Options; its flags are accepted together with the launcher's."""

    values = _launcher_flags()
    define_flags(experiment.Options, values)
    stray = values(argv)[1:]
    if stray:
        raise InputError(f"not a flag: {' '.join(stray)}")
    return read_options(experiment.Options, values)


def _help(name: str | None) -> str:
    values, about = _launcher_flags(), f"Experiments: {', '.join(EXPERIMENTS)}"
    if name is not None:
        define_flags(load(name).Options, values)
        about = f"{name}: {load(name).SUMMARY}"
    return f"{__doc__}\n{about}\n{values.get_help()}"


if __name__ == "__main__":
    command()
