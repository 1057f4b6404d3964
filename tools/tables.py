"""Writes the tables of README.md and of other pages from committed results and from the code.

    python tools/tables.py            writes all tables, and the README's picture
    python tools/tables.py --check    exits with 1 and names what is out of date, writes nothing
    python tools/tables.py --take=DIR copies a benchmark of one of CARDS first

DIR is the folder of a result.json, as `experiments.launch --experiment=benchmark` leaves it. Its
tables and pictures go to the card's folder in benchmarks, in place of an earlier run's.

A table is between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; `PAGES` says which function
writes it. To renew a result that is made on a CPU, run its experiment and copy its result.json:

    python -m experiments.launch --experiment=cache_size --output_dir=out
    cp out/cache_size/result.json benchmarks/results/cache_size.json
"""

import functools
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the other files of this folder

import speed_picture
import tables_accuracy as accuracy
import tables_choices as choices
import tables_generate as generate
import tables_hal as hal
import tables_layer as layer
import tables_predictions as predictions
import tables_prefill as prefill
import tables_profiles as profiles
import tables_speed as speed
from tables_common import CARDS, ROOT, read
from tables_support import prefill_widths, support

TAKEN = ("result.json", "*.csv", "*.png")
Writer = Callable[[Path], str]  # given the checkout


def _of(write: Callable[..., str], *arguments: str) -> Writer:
    return lambda root: write(root, *arguments)


PAGES: dict[str, dict[str, Writer]] = {
    "README.md": {
        "support": support,
        "h200_summary": lambda root: f"{speed.summary(root)}\n\n{prefill.summary(root)}",
        "accuracy_summary": accuracy.summary,
    },
    "benchmarks/README.md": {
        "h200_decode": _of(speed.decode, "h200", "us"),
        "h200_decode_separated": _of(speed.decode, "h200", "us_separated"),
        "h200_decode_sustained": _of(speed.decode, "h200", "us_sustained"),
        "h200_prefill": _of(prefill.prefill, "h200", "ms_burst"),
        "h200_prefill_sustained": _of(prefill.prefill, "h200", "ms_sustained"),
        "h200_latents": _of(prefill.latents, "h200"),
        "h200_layer": _of(prefill.layer, "h200"),
        "h200_prefill_bursts": _of(prefill.beside_flashinfer, "h200"),
        "h200_layer_step": _of(layer.steps, "h200"),
        "h200_layer_parts": _of(layer.parts, "h200"),
        "h200_sharded": _of(layer.sharded, "h200"),
        "h200_targets": _of(speed.targets, "h200"),
        "h200_options": _of(speed.options, "h200"),
        "h200_benchmark": _of(speed.classes, "h200", "h200/"),
    },
    "benchmarks/h100/README.md": {
        "h100_decode": _of(speed.decode, "h100", "us"),
        "h100_decode_separated": _of(speed.decode, "h100", "us_separated"),
        "h100_int8": _of(speed.int8_beside_bf16, "h100", "us"),
        "h100_benchmark": _of(speed.classes, "h100", ""),
    },
    "benchmarks/predictions.md": {
        "predictions": predictions.predicted,
        "prediction_scores": predictions.scores,
    },
    "docs/adding_a_profile.md": {"profile_fields": profiles.fields},
    "docs/hal.md": {
        "h200_choices": _of(choices.choices, "h200"),
        "hopper_errors": hal.hopper_errors,
        "h200_portrait": _of(hal.portrait, "h200"),
        "hal_errors": hal.errors,
    },
    "docs/generate.md": {"h200_generate": _of(generate.kernels, "h200")},
    "docs/hopper_prefill.md": {"prefill_widths": prefill_widths},
    "docs/int8.md": {
        "int8_output": accuracy.int8_output,
        "int8_lse": accuracy.int8_lse,
        "h200_int8": _of(speed.int8_beside_bf16, "h200", "us"),
        "h200_int8_separated": _of(speed.int8_beside_bf16, "h200", "us_separated"),
    },
    "docs/accuracy.md": {
        "parity": accuracy.parity,
        "demo": accuracy.demo,
        "amla_accuracy": accuracy.amla,
    },
    "docs/accounting.md": {
        "cache_size": accuracy.cache_size,
        "cache_steps": accuracy.cache_steps,
        "split_kv": accuracy.split_kv,
    },
}


def fill(text: str, tables: Mapping[str, str]) -> str:
    """The text with every table in its place. KeyError where a place is missing."""
    for name, written in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise KeyError(f"no {begin} ... {end}")
        block = "\n".join(filter(None, (begin, written, end)))
        text = pattern.sub(functools.partial(_same, block), text)
    return text


def _same(block: str, _: re.Match[str]) -> str:
    return block


def take(root: Path, source: Path) -> None:
    """Copies a result to its card's folder. ValueError if it is none, or of another device."""
    path = source / "result.json"
    try:
        result = read(path)
        measured = [row for row in result["rows"] if row["status"] == "measured"]
        devices = sorted({str(row["device"]) for row in measured})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of a benchmark: {error!r}") from error
    cards = [card for card, device in CARDS.items() if [device] == devices]
    if not cards:
        wanted = " or ".join(CARDS.values())
        raise ValueError(f"{path}: rows must be measured on {wanted}, got {devices or 'none'}")
    target = root / "benchmarks" / cards[0] / result["experiment"]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for pattern in TAKEN:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, target / file.name)


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Returns the exit status."""
    for argument in arguments:
        if argument.startswith("--take="):
            try:
                take(root, Path(argument.removeprefix("--take=")))
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
    stale = []
    for page, writers in PAGES.items():
        path = root / page
        text = path.read_text(encoding="utf-8")
        filled = fill(text, {name: write(root) for name, write in writers.items()})
        if filled != text:
            stale.append(page)
            if "--check" not in arguments:
                path.write_text(filled, encoding="utf-8")
    if not speed_picture.is_current(root):
        stale.append(speed_picture.PATH.as_posix())
        if "--check" not in arguments:
            speed_picture.draw(root)
    if "--check" in arguments:
        for page in stale:
            print(f"out of date: {page}", file=sys.stderr)
        return int(bool(stale))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
