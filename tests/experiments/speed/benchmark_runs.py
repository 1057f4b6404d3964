"""Runs of the decode benchmarks on a CPU that take little time."""

import json

from experiments import launch
from experiments.speed.decode.setup import Setup

SMALL = (
    "--kv_lora_rank=32",
    "--rope_dim=16",
    "--preset=tiny",
    "--heads=4",
    "--s_q=1",
    "--kv_len=64",
)
SETUP = Setup(1 << 26, 32, 16, 1 << 16, 2, 2, 4, 4, rounds=2, page_rounds=3, pause=0.0)


def run(tmp_path, *arguments, name="benchmark"):
    status = launch.main(["launch", f"--experiment={name}", f"--output_dir={tmp_path}", *arguments])
    path = tmp_path / name / "result.json"
    return status, json.loads(path.read_text()) if path.exists() else None
