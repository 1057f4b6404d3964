"""The launcher and the experiments that it runs: `python -m experiments.launch --list`."""
