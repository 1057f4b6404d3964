"""Every experiment in small: its arguments, and a run by the launcher."""

import json
from pathlib import Path

from experiments import launch

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
V2_LITE = GOLDEN / "v2_lite"
MODELS = GOLDEN.parent / "models"
PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "published"
SMALL = {
    "demo": (
        f"--checkpoint={V2_LITE}",
        *("--requests=3", "--max_prompt=7", "--chunk=2", "--page_size=16"),
        *("--decode_steps=2", "--mtp_steps=1", "--implementations=xla", "--nomodel"),
    ),
    "correctness": (
        *("--page_sizes=16", "--dtypes=bfloat16", "--layouts=NZ", "--heads=2"),
        *("--kv_lora_rank=32", "--rope_dim=16"),
    ),
    "parity": (f"--checkpoint={V2_LITE}",),
    "soak": ("--steps=25", "--pages=10", "--max_tokens=90", "--kv_lora_rank=32", "--rope_dim=16"),
    "amla_accuracy": ("--rows=32", "--keys=256", "--block=32", "--repeats=1"),
    "int8_accuracy": ("--rows=16", "--keys=512", "--long_keys=512", "--spreads=1"),
    "cache_size": (),
    "split_kv": ("--workers=12",),
    "published": (f"--table={PUBLISHED / 'ascend_int8_v11_over_v0.csv'}",),
    "pipeline": ("--schedule=seesaw",),
    "compare": ("--profile=L40",),
    "sweep": ("--profile=Ascend910B1", "--schedule=chunk4"),
    "best": ("--profile=L40",),
    "portrait": ("--shapes=16x3x640,int8:16x3x640,prefill:2x1x300",),
    "choices": ("--shapes=3", "--most=4"),
    "benchmark": (
        *("--preset=tiny", "--heads=4", "--s_q=1", "--batch=1", "--implementations=xla,jnp"),
        *("--kv_lora_rank=32", "--rope_dim=16"),
    ),
    "prefill": ("--batches=2x9+5", "--heads=2", "--rounds=3", "--dtype=float32"),
    "sharded": ("--splits=keys", "--rounds=1", "--page_size=16"),
    "generate": (
        f"--folder={MODELS / 'deepseek_v2'}",
        *("--requests=3", "--max_prompt=20", "--new_tokens=4", "--slots=2", "--alone=1"),
        *("--rounds=1", "--drafts=2"),
    ),
    "layer_step": ("--rounds=1", "--sustained_ms=5", "--steps=1", "--page_size=16"),
}


def run(tmp_path, name, *arguments):
    """(exit status, result.json or None) of an experiment."""
    status = launch.main(["launch", f"--experiment={name}", f"--output_dir={tmp_path}", *arguments])
    path = tmp_path / name / "result.json"
    return status, json.loads(path.read_text()) if path.is_file() else None
