"""The errors of the simulator's predictions in docs/hal.md, as the fits wrote them."""

import json
from pathlib import Path

from tables_common import table

PROFILES = Path("mla_jax") / "hal" / "profiles"
# Name in the page, and the largest error that the project wants, in percent.
TABLES = {
    "h200_mla_decode.csv": ("H200, measured, other kernels", 6.0),
    "h100_decode.json": ("H100, measured, other kernels", 9.0),
    "flashinfer_mla_decode.csv": ("H100, FlashInfer", 5.0),
    "ascend_910b_fia_mla_decode.csv": ("Ascend FIA, decode", 15.0),
    "ascend_910b_fia_mla_prefill.csv": ("Ascend FIA, causal prefill", 15.0),
    "ascend_int8_v11_over_v0.csv": ("Ascend int8, V11 over V0", 2.4),
}
OURS = ("H200, our float kernels", 8.0)


def errors(root: Path) -> str:
    """The mean absolute percentage error of each table, over its fitted rows and the others."""
    fits = json.loads((root / PROFILES / "fitted.json").read_text(encoding="utf-8"))
    found = {name: both for fit in fits.values() for name, both in fit["mape_by_table"].items()}
    ours = json.loads((root / PROFILES / "hopper.json").read_text(encoding="utf-8"))
    lines = [
        _line(*TABLES[name], found[name]["fitted_rows"], found[name]["other_rows"])
        for name in TABLES
    ]
    lines.insert(1, _line(*OURS, ours["mape_fitted_rows"], ours["mape_other_rows"]))
    return table(["table", "fitted half", "other half", "target"], lines, words=1)


def _line(name: str, target: float, fitted: float, other: float) -> list[str]:
    missed = other > target
    return [name, f"{fitted:.1f} %", f"{other:.1f} %", f"{target:g} %" + ", missed" * missed]
