"""Runs an experiment: python -m experiments.launch --experiment=NAME --output_dir=DIR

It writes DIR/NAME/result.json and the pictures beside it. Exit status: 0 passed, 1 the experiment
ran and did not pass, 2 it could not run as asked (flags, input).
"""

import dataclasses
import datetime
import importlib
import sys
import time
from pathlib import Path
from typing import Any, cast

from absl import flags

from experiments.console import say
from experiments.experiment import Experiment, InputError, Output
from experiments.options import define_flags, read_options
from experiments.results import SCHEMA_VERSION, environment, write_result

# To add an experiment, write its module (see experiment.py) and name it here.
EXPERIMENTS = (
    "demo",
    "correctness",
    "parity",
    "soak",
    "amla_accuracy",
    "int8_accuracy",
    "cache_size",
    "split_kv",
    "published",
    "pipeline",
    "compare",
    "sweep",
    "best",
    "benchmark",
    "kernel_bench",
    "report",
)


def load(name: str) -> Experiment:
    """The module of an experiment."""
    return cast(Experiment, importlib.import_module(f"experiments.{name}"))


def main(argv: list[str]) -> int:
    """Runs what `argv` (program name first) asks for; returns the exit status."""
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
        options = _parse(load(chosen.experiment), argv)
        return _run(chosen.experiment, options, Path(chosen.output_dir))
    except (flags.Error, InputError) as error:
        say(f"error: {error}", style="red", stderr=True)
        return 2


def _run(name: str, options: Any, output_dir: Path) -> int:
    output = Output(output_dir / name)
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    outcome = load(name).run(options, output)
    result = {
        "schema_version": SCHEMA_VERSION,
        "experiment": name,
        "passed": outcome.passed,
        "summary": outcome.summary,
        **outcome.headline,
        "started": started.isoformat(timespec="seconds"),
        "duration_s": round(time.monotonic() - clock, 3),
        "options": dataclasses.asdict(options),
        "environment": environment(),
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


def _launcher_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    where: dict[str, Any] = {"flag_values": values, "module_name": "launcher"}
    flags.DEFINE_enum("experiment", None, EXPERIMENTS, "what to run", **where)
    flags.DEFINE_string("output_dir", "out", "its results go to a folder in this one", **where)
    flags.DEFINE_bool("list", False, "name the experiments, with a line each", **where)
    flags.DEFINE_bool("help", False, "show the flags, of --experiment too if given", **where)
    return values


def _parse(experiment: Experiment, argv: list[str]) -> Any:
    """The experiment's Options; its flags stand beside the launcher's."""
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
    sys.exit(main(sys.argv))
